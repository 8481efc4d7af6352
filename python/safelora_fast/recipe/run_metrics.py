"""The figures that a run leaves: per metric first, last and mean over the training log."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = ("safelora-fast", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "safetensors")
TRAINING = ("loss", "grad_norm")


def summarise(history: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """First, last and mean of every loss (all, by source, held out) and of defences, margin and monitors; None where one is none.

    Args:
        history: the trainer's log; entries of training carry `loss`, those of evaluation `eval_loss`.
    """
    values: dict[str, list[float]] = {}
    for entry in history:
        for name, value in entry.items():
            if (
                name == "eval_loss"
                or name.startswith(("defense/", "loss/", "margin/", "monitor/"))
                or ("loss" in entry and name in TRAINING)
            ):
                values.setdefault(name, []).append(float(value))
    return {name: _summary(found) for name, found in values.items()}


def _summary(values: list[float]) -> dict[str, float | None]:
    """A cosine, say, is none while the adapter is zero: the mean is over what is a number."""
    known = [value for value in values if not math.isnan(value)]
    ends = [None if math.isnan(value) else value for value in (values[0], values[-1])]
    return {"first": ends[0], "last": ends[1], "mean": sum(known) / len(known) if known else None}


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
