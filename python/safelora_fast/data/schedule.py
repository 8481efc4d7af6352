"""Where safe examples stand among task examples, which comes next, and the examples of each epoch: whole numbers and a seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from safelora_fast.data.tokens import Examples
from safelora_fast.errors import SettingsError
from safelora_fast.files.argument_checks import number, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from trl import SFTConfig

    from safelora_fast.data.tokens import ExampleSet

Item = TypeVar("Item")


class Schedule:
    """Exactly so many safe examples for each task example.

    After t task examples round(fraction · t) safe examples are due, halves rounded up. Each stands at a random place between the
    task example that makes it due and the one that makes the next one due. So at every point less than two due examples are
    missing and none is early, and no regular step through the mixture (a process's share) meets only safe examples.

    Args:
        fraction: safe examples per task example; a float counts as the decimal that it is written as.
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
        """Safe examples that belong to so many task examples."""
        return (2 * self._safe * tasks + self._task) // (2 * self._task)

    def place(self, number: int) -> int:
        """How many task examples come before a safe example."""
        return random.Random(f"{self._seed} {number}").randint(self._first(number), self._first(number + 1))  # noqa: S311

    def _first(self, number: int) -> int:
        """The task examples that make a safe example due."""
        return -((2 * number + 1) * -self._task // (2 * self._safe))

    def orders(self, size: int) -> Iterator[int]:
        """Indices of safe examples without end: all in random order, then all in another."""
        for repetition in count():
            yield from np.random.default_rng([self._seed, repetition]).permutation(size).tolist()

    def weave(self, passes: Iterable[Iterable[Item]], safe: Iterator[Item]) -> Iterator[tuple[bool, Item]]:
        """(whether it is safe, example) of the mixture; at the end of each pass all due ones have come.

        Args:
            passes: the task examples, once for each pass over them.
            safe: safe examples, as many as are asked for.
        """
        tasks = given = 0
        place = self.place(0) if self._safe else -1
        for examples in passes:
            for example in examples:
                while tasks == place:
                    yield True, next(safe)
                    given += 1
                    place = self.place(given)
                yield False, example
                tasks += 1
            while given < self.due(tasks):
                yield True, next(safe)
                given += 1
                place = self.place(given)


@dataclass(frozen=True)
class Epochs:
    """Examples of one epoch after another, as indices: all of the task's, and the safe ones that come next.

    Attributes:
        examples: the task's examples, and the safe ones after them.
        tasks: how many are the task's.
        schedule: how many safe examples belong to them, and in which order they come.
        seed: of the order within an epoch.
    """

    examples: ExampleSet
    tasks: int
    schedule: Schedule
    seed: int

    @classmethod
    def of(cls, task: ExampleSet, safe: ExampleSet, schedule: Schedule, arguments: SFTConfig) -> Epochs | None:
        """The epochs of a recipe; None if all have the same examples.

        Packed examples are packed once, for all epochs, and an order by length is the trainer's.
        """
        by_length = getattr(arguments, "group_by_length", False)
        if arguments.packing or by_length or getattr(arguments, "train_sampling_strategy", "random") != "random":
            return None
        seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
        everything = Examples(chain(task.examples, (replace(example, safe=True) for example in safe.examples)))
        return cls(replace(task, examples=everything), len(task.examples), schedule, seed)

    def __len__(self) -> int:
        return self.tasks + self.schedule.due(self.tasks)

    def rows(self, epoch: int) -> list[int]:
        """The indices of an epoch, in training order."""
        due = self.schedule.due(self.tasks)
        safe = self.schedule.orders(len(self.examples.examples) - self.tasks)
        indices = [*range(self.tasks), *(self.tasks + index for index in islice(safe, epoch * due, (epoch + 1) * due))]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(indices))
        return [indices[place] for place in order.tolist()]


@dataclass(frozen=True)
class EpochSampler:
    """What a DataLoader asks for the order of examples.

    Attributes:
        epochs: all of them.
        current: returns the present epoch. It is not counted here, because a resumed run begins in a later one.
    """

    epochs: Epochs
    current: Callable[[], int]

    def __len__(self) -> int:
        return len(self.epochs)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.epochs.rows(self.current()))
