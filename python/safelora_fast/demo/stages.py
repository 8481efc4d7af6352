"""Stages whose results are cached in a folder, and made again only when their inputs change."""

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
    """A chain of stages in one folder; each depends on its settings and on all stages before it.

    Attributes:
        folder: folder of all stages.
        announce: called with the title of each stage, and whether it is reused.
        seconds: duration of each stage when it was made.
    """

    folder: Path
    announce: Callable[[str, bool], None]
    seconds: dict[str, float] = field(default_factory=dict)
    _history: list[Any] = field(default_factory=list)

    def branch(self) -> Stages:
        """Return a chain that continues from here; later stages of the two chains do not affect each other."""
        return replace(self, _history=list(self._history))

    def make(self, name: str, title: str, settings: dict[str, Any], build: Callable[[Path], Any]) -> Path:
        """Return the folder of a stage; if it must be made, `build` fills a temporary folder first.

        Raises:
            OutputError: the folder exists but no stage made it, or it cannot be written.
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
