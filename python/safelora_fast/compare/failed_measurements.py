"""Measurements that are no figures: those that failed, and those of a run that has diverged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

FAILURE = "failure"  # where a content, or a part of one, has the reason why there is nothing
UNFINISHED = "unfinished"  # why some parts of a content failed that may be had another time
NOT_FINITE = "the measurement is not finite"


def not_finite(content: Any, where: str = "") -> str | None:
    """The first NaN or infinity of a measurement, in words; None where all is finite.

    Args:
        content: plain values.
        where: the place of the content in the whole.
    """
    if isinstance(content, float):
        return None if math.isfinite(content) else f"{NOT_FINITE}: {where or 'it'} is {content}"
    found: Sequence[tuple[str, Any]] = ()
    if isinstance(content, Mapping):
        found = [(f"{where}.{key}" if where else str(key), item) for key, item in content.items()]
    elif isinstance(content, list | tuple):
        found = [(f"{where}[{place}]", item) for place, item in enumerate(content)]
    return next((flaw for name, item in found if (flaw := not_finite(item, name)) is not None), None)


def number(value: float | None) -> float:
    """A figure of a file, in which what is not finite is null."""
    return math.nan if value is None else value
