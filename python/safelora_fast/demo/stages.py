"""Stages whose results stay in a folder and are made again only when what they depend on has changed."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import OutputError
from safelora_fast.files.digest import text_digest
from safelora_fast.files.json_reader import NUMBER, TEXT, check_fields, read_json
from safelora_fast.files.output import whole_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STAMP = "stage.json"


@dataclass
class Stages:
    """A chain of stages in one folder: each depends on its settings and on all stages before it.

    Attributes:
        folder: where the stages lie.
        announce: told the title of each stage, and whether it is reused.
        seconds: how long each stage took when it was made.
    """

    folder: Path
    announce: Callable[[str, bool], None]
    seconds: dict[str, float] = field(default_factory=dict)
    _history: list[Any] = field(default_factory=list)

    def branch(self) -> Stages:
        """A chain that goes on from here by itself: its stages depend on those made so far, and not on later ones."""
        return replace(self, _history=list(self._history))

    def make(self, name: str, title: str, settings: dict[str, Any], build: Callable[[Path], Any]) -> Path:
        """The folder of a finished stage; `build` fills it, in a temporary place, if there is none yet.

        Raises:
            OutputError: when the folder exists and no stage made it, or it cannot be written.
        """
        self._history.append([name, settings])
        key = text_digest(self._history)
        target = self.folder / name
        stamp = _read(target / STAMP)
        if target.exists() and not (target / STAMP).exists():
            raise OutputError(f"{target}: exists and was not made by the demo; choose another --output")
        reused = stamp.get("key") == key
        self.announce(title, reused)
        if not reused:
            shutil.rmtree(target, ignore_errors=True)
            start = time.perf_counter()
            with whole_folder(target, overwrite=True) as partial:
                build(partial)
                stamp = {"key": key, "settings": settings, "seconds": time.perf_counter() - start}
                (partial / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        self.seconds[name] = stamp["seconds"]
        return target


def _read(path: Path) -> dict[str, Any]:
    try:
        return check_fields(read_json(path), {"key": TEXT, "seconds": NUMBER})
    except (OSError, ValueError):
        return {}
