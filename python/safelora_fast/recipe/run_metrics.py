"""Metrics of a finished run: a summary of the training log, peak memory, and package versions."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = ("safelora-fast", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "safetensors")
TRAINING = ("loss", "grad_norm")
PREFIXES = ("defense/", "loss/", "margin/", "monitor/", "stop/")


def summarize(history: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return the first, last and mean value of each loss and each defense, margin and monitor metric; None for NaN."""
    values: dict[str, list[float]] = {}
    for entry in history:
        for name, value in entry.items():
            if name == "eval_loss" or name.startswith(PREFIXES) or ("loss" in entry and name in TRAINING):
                values.setdefault(name, []).append(float(value))
    return {name: _summary(found) for name, found in values.items()}


def _summary(values: list[float]) -> dict[str, float | None]:
    """Return first, last and mean; the mean ignores NaN, such as the cosine of an adapter that is still zero."""
    known = [value for value in values if not math.isnan(value)]
    first, last = (None if math.isnan(value) else value for value in (values[0], values[-1]))
    return {"first": first, "last": last, "mean": sum(known) / len(known) if known else None}


def shown(value: float | None) -> str:
    """Format a value with four significant digits; a dash for None."""
    return "–" if value is None else f"{value:.4g}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect the result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """Return the processor's model (its architecture if the system does not tell) and the number of cores."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


def peak_bytes() -> dict[str, int | None]:
    """Return peak memory in bytes: resident in this process, and torch's total on all GPUs (None without a GPU)."""
    import torch

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {"resident": peak_resident(), "gpu": sum(map(torch.cuda.max_memory_allocated, gpus)) if gpus else None}


def peak_resident() -> int:
    """Return the peak resident memory of this process, in bytes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    # Not ru_maxrss: on Linux, a child process starts with its parent's value.
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
