"""The runs of a comparison, and where everything of it lies.

```
FOLDER/
  report.html, report.md, report.json
  compare.yaml                          the configuration that the files belong to, with overrides
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
from safelora_fast.errors import AdapterError, OutputError
from safelora_fast.files.json_reader import read_object
from safelora_fast.recipe.run_folder import RECORD, read_record

if TYPE_CHECKING:
    from safelora_fast.compare.config import CompareConfig, RunSpec

CONFIGURATION = "compare.yaml"
TRAINING_FAILURE = "failure.json"
REFERENCE = "reference"
OPERATOR_SWAP = "operator-swap"


@dataclass(frozen=True)
class Run:
    """One training of a defense with one seed, or the reference.

    Attributes:
        name: of the defense, as the configuration has it.
        seed: of the training; None for the reference.
        folder: where its files go.
        adapter: where its adapter lies, or will; None for the reference.
        is_trained: whether it is trained here, rather than taken as a finished adapter.
    """

    name: str
    seed: int | None
    folder: Path
    adapter: Path | None
    is_trained: bool = False

    @property
    def label(self) -> str:
        """The run in words."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"

    @property
    def on_operator_swap(self) -> Run:
        """The same run, trained on the operator-swap task."""
        folder = self.folder / OPERATOR_SWAP
        adapter = None if self.adapter is None else folder / "adapter"
        return Run(self.name, self.seed, folder, adapter, self.is_trained)

    def is_of(self, spec: RunSpec) -> bool:
        """Whether it is a seed of a defense."""
        return self.seed is not None and self.name == spec.name

    def file(self, measure: str) -> Path:
        """Where a measurement is kept."""
        return self.folder / f"{measure}.json"

    def read(self, measure: str) -> dict[str, Any]:
        """The content of the file of a measurement; empty if it cannot be read."""
        return read_json_file(self.file(measure))

    def record(self) -> dict[str, Any]:
        """The record of the training; empty if it was not done here."""
        try:
            return {} if self.adapter is None else read_record(self.adapter / RECORD)
        except (OSError, ValueError):
            return {}


def read_json_file(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none that can be read."""
    try:
        return read_object(file)
    except (OSError, ValueError):
        return {}


_fetched = functools.cache(lambda source: adapter_folder(source, tokenizer=True))  # the same commit for every measure


def _finished_adapter(source: str) -> Path:
    """The folder of a finished adapter; if there is none, the path as it was given: its cells say so."""
    try:
        return _fetched(source)
    except AdapterError:
        return Path(source).expanduser()


def runs_of(config: CompareConfig, spec: RunSpec) -> list[Run]:
    """The seeds of a defense."""
    found = []
    for seed in config.seeds_of(spec):
        folder = config.output / spec.folder / f"seed-{seed}"
        source = spec.adapters.get(seed)
        adapter = folder / "adapter" if source is None else _finished_adapter(source)
        found.append(Run(spec.name, seed, folder, adapter, is_trained=source is None))
    return found


def reference_of(config: CompareConfig) -> Run:
    """The model before the fine-tune."""
    return Run(REFERENCE, None, config.output / REFERENCE, None)


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else.

    Raises:
        OutputError: with the reason.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; give the name of a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIGURATION).is_file():
        raise OutputError(f"{folder}: holds files that are not of a comparison; choose another output")
