"""The output folder of a run: its record, its checkpoints, and what may be done with one that exists.

```
FOLDER/
  adapter_model.safetensors, adapter_config.json, README.md     once the run has finished
  safelora_train.json                                            from the start; "finished" says how far it is
  checkpoints/checkpoint-N/                                      whole when safelora_checkpoint.json lies in it
```
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import OutputError, SettingsError
from safelora_fast.files.digest import digest
from safelora_fast.files.json_reader import (
    COUNT,
    FLAG,
    LIST,
    NUMBER,
    OBJECT,
    TEXT,
    TEXTS,
    check_fields,
    is_file,
    read_json,
    read_object,
    why,
)
from safelora_fast.files.output import check_target, described, sync
from safelora_fast.files.store import changed_settings, changes_text, plain, write_json
from safelora_fast.recipe.model_stamp import named_files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safelora_fast.recipe.recipe import Recipe

RECORD = "safelora_train.json"
CHECKPOINTS = "checkpoints"
SEAL = "safelora_checkpoint.json"
TRAINER_STATE = "trainer_state.json"
FORMAT = 1
AT_THE_END = {"steps": COUNT, "seconds": NUMBER, "metrics": OBJECT}
PARTS = {
    "finished": FLAG, "recipe": OBJECT, "data": OBJECT, "plan": OBJECT, "projection": OBJECT, "step_seconds": NUMBER,
    "peak_bytes": OBJECT,
}  # fmt: skip
MOVABLE = {"data.path": "train", "data.eval": "held_out", "data.safe.path": "safe"}  # names in the record's data


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, the optimizer steps made, and the seconds of training until then."""

    path: Path
    step: int
    seconds: float


@dataclass(frozen=True)
class RunFolder:
    """The output folder of a recipe."""

    recipe: Recipe

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.recipe.output.folder).expanduser()

    def check(self, *, resume: bool, overwrite: bool, nbytes: int = 0) -> None:
        """Refuse a folder that this run must not write to.

        Raises:
            OutputError: it exists and neither resume nor overwrite was asked for, belongs to something else, lies in an
                input or holds one, cannot be written, or has no room for `nbytes`.
            SettingsError: resume was asked for and the recipe has changed; the keys are named.
        """
        if resume and overwrite:
            raise SettingsError("--resume goes on with a run and --overwrite starts anew: pass one of them")
        check_target(self.path, self._inputs(), overwrite=True, nbytes=nbytes)
        if not self.path.exists() or not any(map(_matters, self.path.iterdir())):
            return
        if not (self.path / RECORD).exists():
            raise OutputError(
                f"{self.path}: holds files that are not of a training run; choose another output.folder, or delete it"
            )
        if not resume and not overwrite:
            raise OutputError(
                f"{self.path}: holds a run already; pass --resume to go on with it, --overwrite to start anew, or choose "
                "another output.folder"
            )
        if resume:
            self.compare(self.recipe.resolved(), "recipe")

    def _inputs(self) -> list[Path]:
        recipe = self.recipe
        named: list[object] = [recipe.document.source, recipe.model.path, recipe.data.path, recipe.data.eval]
        named += [recipe.data.safe.path] if recipe.data.safe else []
        paths = [Path(item).expanduser() for item in (*named, *named_files(recipe).values()) if isinstance(item, str)]
        return [path for path in paths if path.exists()]

    def compare(self, wanted: Mapping[str, Any], part: str) -> None:
        """Refuse to resume when a part of the record differs from what is wanted now.

        Raises:
            SettingsError: with the keys that changed.
        """
        changes = self.changes(wanted, part)
        if changes is not None:
            raise SettingsError(
                f"{self.path}: cannot be resumed, because the {part} has changed: {changes}; change it back, or pass "
                "--overwrite to start anew"
            )

    def changes(self, wanted: Mapping[str, Any], part: str) -> str | None:
        """How a part of the record differs from what is wanted now, in words; None if it does not.

        Where the output is does not matter, nor where the data are, as long as their files are the same.
        """
        record = self.read_record()
        changed = changed_settings(record.get(part) or {}, plain(wanted))
        moved = {key for key, (_, now) in changed.items() if key == "output.folder" or _is_moved(key, now, record)}
        return changes_text({key: changed[key] for key in changed if key not in moved}) or None

    def read_record(self) -> dict[str, Any]:
        """The record of the run; empty if there is none.

        Raises:
            OutputError: it cannot be read.
        """
        file = self.path / RECORD
        if not file.exists():
            return {}
        try:
            return read_record(file)
        except (OSError, ValueError) as error:
            raise OutputError(f"{file}: the record of the run is damaged: {why(error)}") from error

    def begin(self, record: Mapping[str, Any], *, anew: bool) -> None:
        """Make the folder and write the record of a run that is not finished; `anew` removes an earlier one.

        Raises:
            OutputError: the system refuses to write.
        """
        with described(self.path):
            if anew and self.path.exists():
                aside = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.replaced-", dir=self.path.parent))
                self.path.rename(aside / "run")
                shutil.rmtree(aside, ignore_errors=True)
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / RECORD, {"format": FORMAT, "finished": False, **record})
            (self.path / CHECKPOINTS).mkdir(exist_ok=True)
            for folder in self._checkpoints():
                if not (folder / SEAL).exists():
                    shutil.rmtree(folder)

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / CHECKPOINTS).glob("checkpoint-*"))

    def seal(self, step: int, seconds: float) -> None:
        """Mark the checkpoint of a step as whole, once all of it is on the disk."""
        folder = self.path / CHECKPOINTS / f"checkpoint-{step}"
        with described(self.path):
            for file in sorted(folder.rglob("*")):
                sync(file)
            write_json(folder / SEAL, {"step": step, "seconds": seconds})

    def last_checkpoint(self) -> Checkpoint | None:
        """The whole checkpoint with the most steps."""
        whole = []
        for folder in self._checkpoints():
            try:
                seal = check_fields(read_json(folder / SEAL), {"step": COUNT, "seconds": NUMBER})
                if is_file(folder / TRAINER_STATE):  # the trainer reads it without a look
                    check_fields(read_json(folder / TRAINER_STATE), {"global_step": COUNT, "log_history": LIST})
                whole.append(Checkpoint(folder, seal["step"], float(seal["seconds"])))
            except (OSError, ValueError):
                continue
        return max(whole, key=lambda checkpoint: checkpoint.step, default=None)


def read_record(file: Path) -> dict[str, Any]:
    """The record of a run, whose parts are of the types that :mod:`safelora_fast.recipe.run` writes.

    Raises:
        OSError, ValueError: as :func:`~safelora_fast.files.json_reader.check_fields`; it is not of this format.
    """
    record = read_object(file)
    if record.get("format") != FORMAT:
        raise ValueError(f"it is no record of a run of format {FORMAT}")
    check_fields(record, AT_THE_END if record.get("finished") is True else {}, {**AT_THE_END, **PARTS})
    for part, kind in (("data", TEXT), ("peak_bytes", NUMBER), ("metrics", OBJECT)):
        values = record.get(part) or {}
        check_fields(values, {}, dict.fromkeys(values, kind))
    for metric in (record.get("metrics") or {}).values():
        check_fields(metric, {}, dict.fromkeys(("first", "last", "mean"), NUMBER))
    check_fields(record.get("projection") or {}, {}, {"warnings": TEXTS})
    return record


def _matters(file: Path) -> bool:
    """False for what a run left that was killed while it wrote its first record."""
    return not (file.name.startswith(f".{RECORD}.") and "partial" in file.name)


def _is_moved(key: str, now: Any, record: Mapping[str, Any]) -> bool:
    """Whether a setting names the same data in another place."""
    known = (record.get("data") or {}).get(MOVABLE.get(key))
    path = Path(now).expanduser() if isinstance(now, str) else None
    return known is not None and path is not None and path.is_file() and digest(path) == known
