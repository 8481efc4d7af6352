"""Where safe rows stand among task rows, and which safe row comes next: whole numbers and a seed, no state."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import count
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from safelora_fast.errors import SettingsError
from safelora_fast.files.argument_checks import number, whole_number

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Row = TypeVar("Row")


class Schedule:
    """Safe rows for each task row, exactly.

    After t task rows round(fraction · t) safe rows are due, halves rounded up. Each stands at a random place from the task
    row that makes it due to the one that makes the next one due. So at every point of the mixture less than two due rows
    are missing and none is early, and no regular step through the mixture (a process's share) meets only safe rows.

    Args:
        fraction: safe rows per task row; a float counts as the decimal that it is written as.
        seed: of places and order.

    Raises:
        SettingsError: the fraction is no number, negative or not finite, or the seed is no whole number from 0.
    """

    def __init__(self, fraction: float | Fraction, seed: int) -> None:
        number("interleave: fraction", fraction)
        if not (math.isfinite(fraction) and fraction >= 0):
            raise SettingsError(f"interleave: fraction is {fraction}, it must be finite and not negative")
        if whole_number("interleave: seed", seed) < 0:
            raise SettingsError(f"interleave: seed is {seed}, it must not be negative")
        share = Fraction(str(fraction))
        self._safe, self._task = share.numerator, share.denominator
        self._seed = seed

    def due(self, tasks: int) -> int:
        """Safe rows that belong to so many task rows."""
        return (2 * self._safe * tasks + self._task) // (2 * self._task)

    def place(self, number: int) -> int:
        """How many task rows come before a safe row."""
        return random.Random(f"{self._seed} {number}").randint(self._first(number), self._first(number + 1))  # noqa: S311

    def _first(self, number: int) -> int:
        """The task rows that make a safe row due."""
        return -((2 * number + 1) * -self._task // (2 * self._safe))

    def orders(self, rows: int) -> Iterator[int]:
        """Indices of safe rows without end: all in random order, then all in another."""
        for repetition in count():
            yield from np.random.default_rng([self._seed, repetition]).permutation(rows).tolist()

    def weave(self, passes: Iterable[Iterable[Row]], safe: Iterator[Row]) -> Iterator[tuple[bool, Row]]:
        """(whether it is safe, row) of the mixture; at the end of each pass what is due has come.

        Args:
            passes: the task rows, once for each pass over them.
            safe: safe rows, as many as are asked for.
        """
        tasks = given = 0
        place = self.place(0) if self._safe else -1
        for rows in passes:
            for row in rows:
                while tasks == place:
                    yield True, next(safe)
                    given += 1
                    place = self.place(given)
                yield False, row
                tasks += 1
            while given < self.due(tasks):
                yield True, next(safe)
                given += 1
                place = self.place(given)
