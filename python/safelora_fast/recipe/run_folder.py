"""The output folder of a run: its record, its checkpoints, and the rules for resuming or overwriting it.

```
FOLDER/
  adapter_model.safetensors, adapter_config.json, README.md     written when the run finishes
  safelora_train.json                                            written at the start; "finished" marks a completed run
  checkpoints/checkpoint-N/                                      complete if it contains safelora_checkpoint.json
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
    "peak_bytes": OBJECT, "stop": OBJECT, "adapter_sha256": TEXT, "machine": TEXT,
}  # fmt: skip
MOVABLE = {"data.path": "train", "data.eval": "held_out", "data.safe.path": "safe"}  # keys of the record's "data"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, its optimizer step, and the seconds of training before it."""

    path: Path
    step: int
    seconds: float


@dataclass(frozen=True)
class RunFolder:
    """The output folder of a recipe."""

    recipe: Recipe

    @property
    def path(self) -> Path:
        """The path of the folder."""
        return Path(self.recipe.output.folder).expanduser()

    def check(self, *, resume: bool, overwrite: bool, nbytes: int = 0) -> None:
        """Check that this run may write to the folder.

        Raises:
            OutputError: the folder exists without `resume` or `overwrite`, holds other files, is inside an input or
                contains one, is not writable, or lacks space for `nbytes`.
            SettingsError: `resume` and `overwrite` are both set, or `resume` is set and the recipe has changed; the
                message names the changed keys.
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
        """Check that a part of the record equals the current value, so that the run can be resumed.

        Raises:
            SettingsError: they differ; the message names the changed keys.
        """
        changes = self.changes(wanted, part)
        if changes is not None:
            raise SettingsError(
                f"{self.path}: cannot be resumed, because the {part} has changed: {changes}; change it back, or pass "
                "--overwrite to start anew"
            )

    def changes(self, wanted: Mapping[str, Any], part: str) -> str | None:
        """Describe how a part of the record differs from the current value; None if they are equal.

        A different output folder, or a different path to a data file with the same contents, is not a change. An input
        that is not on this machine (its digest is None) cannot be compared, and is not a change either.
        """
        record = self.read_record()
        changed = changed_settings(record.get(part) or {}, plain(wanted))
        if part == "input":
            changed = {key: (was, now) for key, (was, now) in changed.items() if now is not None}
        moved = {key for key, (_, now) in changed.items() if key == "output.folder" or _is_moved(key, now, record)}
        return changes_text({key: changed[key] for key in changed if key not in moved}) or None

    def read_record(self) -> dict[str, Any]:
        """Return the record of the run; empty if there is none.

        Raises:
            OutputError: the record cannot be read.
        """
        file = self.path / RECORD
        if not file.exists():
            return {}
        try:
            return read_record(file)
        except (OSError, ValueError) as error:
            raise OutputError(f"{file}: the record of the run is damaged: {why(error)}") from error

    def begin(self, record: Mapping[str, Any], *, anew: bool) -> None:
        """Create the folder and write the record of an unfinished run; `anew` removes an earlier run first.

        Raises:
            OutputError: writing fails.
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
        """Sync the checkpoint of a step to disk, then mark it as complete."""
        folder = self.path / CHECKPOINTS / f"checkpoint-{step}"
        with described(self.path):
            for file in sorted(folder.rglob("*")):
                sync(file)
            write_json(folder / SEAL, {"step": step, "seconds": seconds})

    def last_checkpoint(self) -> Checkpoint | None:
        """Return the latest complete checkpoint, or None."""
        whole = []
        for folder in self._checkpoints():
            try:
                seal = check_fields(read_json(folder / SEAL), {"step": COUNT, "seconds": NUMBER})
                if is_file(folder / TRAINER_STATE):  # the trainer does not validate it
                    check_fields(read_json(folder / TRAINER_STATE), {"global_step": COUNT, "log_history": LIST})
                whole.append(Checkpoint(folder, seal["step"], float(seal["seconds"])))
            except (OSError, ValueError):
                continue
        return max(whole, key=lambda checkpoint: checkpoint.step, default=None)


def read_record(file: Path) -> dict[str, Any]:
    """Read the record of a run and check that its parts have the types that :mod:`safelora_fast.recipe.run` writes.

    Raises:
        OSError: the file cannot be read.
        ValueError: the format differs, or :func:`~safelora_fast.files.json_reader.check_fields` rejects a part.
    """
    record = read_object(file)
    if record.get("format") != FORMAT:
        raise ValueError(f"it is not a record of a run of format {FORMAT}")
    check_fields(record, AT_THE_END if record.get("finished") is True else {}, {**AT_THE_END, **PARTS})
    for part, kind in (("data", TEXT), ("peak_bytes", NUMBER), ("metrics", OBJECT)):
        values = record.get(part) or {}
        check_fields(values, {}, dict.fromkeys(values, kind))
    for metric in (record.get("metrics") or {}).values():
        check_fields(metric, {}, dict.fromkeys(("first", "last", "mean"), NUMBER))
    check_fields(record.get("projection") or {}, {}, {"warnings": TEXTS})
    stop = check_fields(record.get("stop") or {}, {}, {"highest": OBJECT, "alarm": OBJECT})
    check_fields(highest := stop.get("highest") or {}, {}, dict.fromkeys(highest, NUMBER))
    return record


def _matters(file: Path) -> bool:
    """Return False for the partial record of a run that was killed while it wrote its first record."""
    return not (file.name.startswith(f".{RECORD}.") and "partial" in file.name)


def _is_moved(key: str, now: Any, record: Mapping[str, Any]) -> bool:
    """Return whether a setting names the same data under another path."""
    known = (record.get("data") or {}).get(MOVABLE.get(key))
    path = Path(now).expanduser() if isinstance(now, str) else None
    return known is not None and path is not None and path.is_file() and digest(path) == known
