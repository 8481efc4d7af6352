"""Axes: from values to places, with ticks at round numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MARGIN = 0.06  # of the span, beyond the outermost values


@dataclass(frozen=True)
class Scale:
    """A linear axis.

    Attributes:
        low, high: the values at its ends.
        start, end: the places of these.
        ticks: round values between them.
        decimals: that tell the ticks apart.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    decimals: int

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, *, ticks: int) -> Scale:
        """An axis that holds all values with a margin, and has about that many ticks.

        Where no value is below zero, no tick is. There are two at least: one alone tells nothing of distances.
        """
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        span = high - low
        if span <= 1e-9 * max(abs(low), abs(high)):
            span = abs(high) or 1.0
            low, high = low - span / 2, high + span / 2
        lowest = min(finite)
        low, high = low - MARGIN * span, high + MARGIN * span
        least = max(low, 0.0 if lowest >= 0 else low)
        step = round_step((high - low) / max(ticks, 1))
        while len(numbers := range(math.ceil(least / step), math.floor(high / step) + 1)) < 2:
            step = round_step(step / 3)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return cls(low, high, start, end, tuple(number * step for number in numbers), decimals)

    def place(self, value: float) -> float:
        """Where a value stands."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def text(self, tick: float) -> str:
        """What stands beside a tick."""
        text = f"{abs(tick):.{self.decimals}f}"
        return f"−{text}" if tick < 0 and float(text) else text


def round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= least * (1 - 1e-9)), 10 * power)
