"""The most memory that this process has held."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def peak_bytes() -> dict[str, int | None]:
    """Peaks of memory in bytes: resident in this process, and of torch on all GPUs together (None without one)."""
    import torch

    there = torch.cuda.is_available()
    gpus = (
        sum(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count())) if there else None
    )
    return {"resident": peak_resident(), "gpu": gpus}


def peak_resident() -> int:
    """Most memory that this process has had resident, in bytes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    # Not ru_maxrss: on Linux that of a child begins with the parent's.
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
