"""The positions and order of safe examples among task examples, and the examples of each epoch."""

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
    """An exact schedule of safe examples per task example.

    After t task examples, round(fraction · t) safe examples are due; halves round up. Each comes at a random position
    between the task example that makes it due and the one that makes the next one due. At every point less than two due
    examples are missing, and none comes early. Random positions ensure that no regular step through the mixture (one
    process's share) contains only safe examples.

    Args:
        fraction: safe examples per task example; a float is read as its decimal representation.
        seed: seed for positions and order.

    Raises:
        SettingsError: the fraction is negative, infinite or not a number, or the seed is not a whole number from 0.
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
        """Return how many safe examples are due after `tasks` task examples."""
        return (2 * self._safe * tasks + self._task) // (2 * self._task)

    def place(self, number: int) -> int:
        """Return how many task examples come before safe example `number`."""
        return random.Random(f"{self._seed} {number}").randint(self._first(number), self._first(number + 1))  # noqa: S311

    def _first(self, number: int) -> int:
        """Return after how many task examples safe example `number` is due."""
        return -((2 * number + 1) * -self._task // (2 * self._safe))

    def orders(self, size: int) -> Iterator[int]:
        """Yield indices of safe examples endlessly: all in a random order, then all in another one."""
        for repetition in count():
            yield from np.random.default_rng([self._seed, repetition]).permutation(size).tolist()

    def weave(self, passes: Iterable[Iterable[Item]], safe: Iterator[Item]) -> Iterator[tuple[bool, Item]]:
        """Yield (is_safe, example) of the mixture; each pass ends with all due safe examples yielded.

        Args:
            passes: the task examples, once for each pass.
            safe: an iterator over safe examples that does not run out.
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
    """The example indices of each epoch: all task examples, and the next safe ones.

    Attributes:
        examples: the task examples, followed by the safe ones.
        tasks: number of task examples.
        schedule: the number and order of safe examples.
        seed: seed for the order within an epoch.
    """

    examples: ExampleSet
    tasks: int
    schedule: Schedule
    seed: int

    @classmethod
    def of(cls, task: ExampleSet, safe: ExampleSet, schedule: Schedule, arguments: SFTConfig) -> Epochs | None:
        """Return the epochs of a recipe, or None if all epochs have the same examples.

        They are the same if examples are packed, because packing runs once, or if the trainer orders them by length.
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
        """Return the indices of an epoch, in training order."""
        due = self.schedule.due(self.tasks)
        safe = self.schedule.orders(len(self.examples.examples) - self.tasks)
        indices = [*range(self.tasks), *(self.tasks + index for index in islice(safe, epoch * due, (epoch + 1) * due))]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(indices))
        return [indices[place] for place in order.tolist()]


@dataclass(frozen=True)
class EpochSampler:
    """A DataLoader sampler that returns the example order of the current epoch.

    Attributes:
        epochs: the example indices of all epochs.
        current: returns the current epoch, which the sampler cannot count because a resumed run starts in a later one.
    """

    epochs: Epochs
    current: Callable[[], int]

    def __len__(self) -> int:
        return len(self.epochs)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.epochs.rows(self.current()))
