"""Where everything of a comparison lies.

```
FOLDER/
  report.html, report.md, report.json
  compare.yaml                          the configuration that the files belong to, overrides put in
  operator-swap/                        the rows of that task
  reference/MEASURE.json                the model before the fine-tune
  RUN/seed-N/recipe.yaml, adapter/      what `safelora-fast train` read and wrote
  RUN/seed-N/failure.json               why there is no adapter
  RUN/seed-N/MEASURE.json               a measurement, or why there is none
  RUN/seed-N/operator-swap/             the same run on that task: recipe.yaml, adapter/, failure.json
```
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.resolver import adapter_folder
from safelora_fast.compare.config import OPERATOR_SWAP, REFERENCE
from safelora_fast.errors import AdapterError, OutputError
from safelora_fast.files.json_reader import read_object
from safelora_fast.files.output import described
from safelora_fast.files.store import write_json
from safelora_fast.recipe.run_folder import RECORD, read_record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safelora_fast.compare.config import CompareConfig, RunSpec

CONFIGURATION = "compare.yaml"
FAILURE = "failure.json"


@dataclass(frozen=True)
class Place:
    """One run, or the reference.

    Attributes:
        name: of the run, as the configuration has it.
        seed: of the training; None for the reference.
        folder: where its files go.
        adapter: where its adapter lies, or will; None for the reference.
    """

    name: str
    seed: int | None
    folder: Path
    adapter: Path | None

    @property
    def trained(self) -> Place:
        """The same run, trained on the operator-swap task."""
        folder = self.folder / OPERATOR_SWAP
        return Place(self.name, self.seed, folder, None if self.adapter is None else folder / "adapter")

    def file(self, measure: str) -> Path:
        """Where a measurement is kept."""
        return self.folder / f"{measure}.json"

    def record(self) -> dict[str, Any]:
        """The record of the training; empty where it was not done here."""
        try:
            return {} if self.adapter is None else read_record(self.adapter / RECORD)
        except (OSError, ValueError):
            return {}


def _finished(source: str) -> Path:
    """The folder of a finished adapter; where there is none, the path as it was given: its cells say so."""
    try:
        return _found(source)
    except AdapterError:
        return Path(source).expanduser()


@functools.cache
def _found(source: str) -> Path:
    """Of the Hub, the same commit for every measure."""
    return adapter_folder(source, tokenizer=True)


def places_of(config: CompareConfig, run: RunSpec) -> list[Place]:
    """Where a run's seeds lie."""
    found = []
    for seed in config.seeds_of(run):
        folder = config.output / run.folder / f"seed-{seed}"
        source = run.adapters.get(seed)
        found.append(Place(run.name, seed, folder, folder / "adapter" if source is None else _finished(source)))
    return found


def reference_of(config: CompareConfig) -> Place:
    """Where the measurements of the model before the fine-tune lie."""
    return Place(REFERENCE, None, config.output / REFERENCE, None)


def read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        return read_object(file)
    except (OSError, ValueError):
        return {}


def keep(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object.

    Raises:
        OutputError: the system refuses.
    """
    with described(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)


def check_place(folder: Path) -> None:
    """Refuse a folder that holds something else.

    Raises:
        OutputError: with the reason.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; give the name of a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIGURATION).is_file():
        raise OutputError(f"{folder}: holds files that are not of a comparison; choose another output")
