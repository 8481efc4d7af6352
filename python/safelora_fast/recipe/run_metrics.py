"""The metrics that a run leaves: of its training log, its memory, and the versions that it depends on."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = ("safelora-fast", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "safetensors")
TRAINING = ("loss", "grad_norm")
PREFIXES = ("defense/", "loss/", "margin/", "monitor/")


def summarize(history: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """First, last and mean of every loss (all, by source, held out) and of defenses, margin and monitors; None for NaN."""
    values: dict[str, list[float]] = {}
    for entry in history:
        for name, value in entry.items():
            if name == "eval_loss" or name.startswith(PREFIXES) or ("loss" in entry and name in TRAINING):
                values.setdefault(name, []).append(float(value))
    return {name: _summary(found) for name, found in values.items()}


def _summary(values: list[float]) -> dict[str, float | None]:
    """The mean leaves NaN out: the cosine of an adapter that is still zero, for example."""
    known = [value for value in values if not math.isnan(value)]
    first, last = (None if math.isnan(value) else value for value in (values[0], values[-1]))
    return {"first": first, "last": last, "mean": sum(known) / len(known) if known else None}


def shown(value: float | None) -> str:
    """Four significant digits, or a dash where there is no value."""
    return "–" if value is None else f"{value:.4g}"


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_bytes() -> dict[str, int | None]:
    """Peaks of memory in bytes: resident in this process, and of torch on all GPUs together (None without one)."""
    import torch

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {"resident": peak_resident(), "gpu": sum(map(torch.cuda.max_memory_allocated, gpus)) if gpus else None}


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
