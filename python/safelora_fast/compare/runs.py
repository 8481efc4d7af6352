"""The runs of a comparison, and the layout of its folder.

```
FOLDER/
  report.html, report.md, report.json
  compare.yaml                          the configuration that the files belong to, with overrides
  operator-swap/                        the training examples and problems of that task
  reference/MEASURE.json                a measurement of the model before the fine-tune
  RUN/seed-N/recipe.yaml, adapter/      input and output of `safelora-fast train`
  RUN/seed-N/failure.json               the reason why there is no adapter
  RUN/seed-N/MEASURE.json               a measurement, or the reason why there is none
  RUN/seed-N/operator-swap/             the same run, trained on that task: recipe.yaml, adapter/, failure.json
```
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.adapter import WEIGHTS
from safelora_fast.checkpoints.resolver import adapter_folder
from safelora_fast.errors import AdapterError, OutputError
from safelora_fast.files.json_reader import read_object
from safelora_fast.recipe.run_folder import RECORD, read_record

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIGURATION = "compare.yaml"
TRAINING_FAILURE = "failure.json"
REFERENCE = "reference"
OPERATOR_SWAP = "operator-swap"
UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class RunSpec:
    """One defense: its changes to the recipe, or finished adapters that are measured unchanged.

    Attributes:
        name: name in the configuration.
        changes: recipe sections, merged over the shared recipe.
        adapters: folders or Hub ids of finished adapters, by seed; empty for runs that are trained here.
    """

    name: str
    changes: dict[str, Any]
    adapters: Mapping[int, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        return UNSAFE.sub("-", self.name.lower()).strip("-.") or "run"


@dataclass(frozen=True)
class Run:
    """One training of a defense with one seed, or the reference.

    Attributes:
        name: name of the defense in the configuration.
        seed: training seed; None for the reference.
        folder: folder of its files.
        adapter: folder of its adapter, which may not exist yet; None for the reference.
        is_trained: whether it is trained here; False for finished adapters.
    """

    name: str
    seed: int | None
    folder: Path
    adapter: Path | None
    is_trained: bool = False

    @property
    def label(self) -> str:
        """Name and seed as text."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"

    @property
    def on_operator_swap(self) -> Run:
        """The same run, trained on the operator-swap task."""
        folder = self.folder / OPERATOR_SWAP
        adapter = None if self.adapter is None else folder / "adapter"
        return Run(self.name, self.seed, folder, adapter, self.is_trained)

    def is_of(self, spec: RunSpec) -> bool:
        """Return whether the run is a seed of this defense."""
        return self.seed is not None and self.name == spec.name

    def is_without_weights(self) -> bool:
        """Return whether the run was trained, but only its record is here: adapters need not be kept or committed."""
        return self.is_trained and self.adapter is not None and not (self.adapter / WEIGHTS).is_file()

    def recorded_adapter(self) -> str | None:
        """Return the digest of the adapter that the record of a finished training names."""
        record = self.record()
        digest: str | None = record.get("adapter_sha256") if record.get("finished") is True else None
        return digest

    def file(self, measure: str) -> Path:
        """Return the path of a measurement file."""
        return self.folder / f"{measure}.json"

    def read(self, measure: str) -> dict[str, Any]:
        """Return the content of a measurement file; empty if it cannot be read."""
        return read_json_file(self.file(measure))

    def record(self) -> dict[str, Any]:
        """Return the record of the training; empty if the run was not trained here."""
        try:
            return {} if self.adapter is None else read_record(self.adapter / RECORD)
        except (OSError, ValueError):
            return {}


def read_json_file(file: Path) -> dict[str, Any]:
    """Return a JSON object; empty if it cannot be read."""
    try:
        return read_object(file)
    except (OSError, ValueError):
        return {}


_fetched = functools.cache(lambda source: adapter_folder(source, tokenizer=True))  # one commit for every measure


def finished_adapter(source: str) -> Path:
    """Return the folder of a finished adapter; if there is none, return the given path, so its cells show the error."""
    try:
        return _fetched(source)
    except AdapterError:
        return Path(source).expanduser()


def check_folder(folder: Path) -> None:
    """Check that the folder is empty, missing or a comparison's.

    Raises:
        OutputError: with the reason.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; give the name of a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIGURATION).is_file():
        raise OutputError(f"{folder}: holds files that are not of a comparison; choose another output")
