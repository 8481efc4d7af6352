"""Run measurements in separate processes, because allocator settings are read when a process starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# Keep freed memory, so that nobody pays for fresh pages; or return it at once, so that a peak is a true peak.
KEEPING = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
RETURNING = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}


def run_script(script: Path, allocator: dict[str, str], *arguments: object) -> Any:
    """Run a script with these allocator settings; return the JSON on its last line."""
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, **allocator, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(work: Callable[[], object]) -> dict[str, float]:
    """Return resident megabytes before `work`, after its first run, and at the peak of its second run."""
    work()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return {"before_mb": before, "peak_mb": _status("VmHWM")}


def _status(field: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024
