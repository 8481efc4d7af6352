"""The rows of each epoch: all of the task's, and the safe ones that come next."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from safelora_fast.data.example_arrays import Examples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trl import SFTConfig

    from safelora_fast.data.schedule import Schedule
    from safelora_fast.data.tokens import ExampleSet


@dataclass(frozen=True)
class Epochs:
    """Rows of one epoch after another, as indices; every epoch has as many.

    Attributes:
        examples: the task's examples, and the safe ones after them.
        tasks: how many are the task's.
        schedule: how many safe rows belong to them, and in which order they come.
        seed: of the order of an epoch's rows.
    """

    examples: ExampleSet
    tasks: int
    schedule: Schedule
    seed: int

    @classmethod
    def of(cls, task: ExampleSet, safe: ExampleSet, schedule: Schedule, arguments: SFTConfig) -> Epochs | None:
        """The epochs of a recipe; None where all have the same rows.

        Rows are packed once, for all epochs, and an order by length is the trainer's.
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
        """The rows of an epoch, in the order in which they are trained on."""
        due = self.schedule.due(self.tasks)
        safe = self.schedule.orders(len(self.examples.examples) - self.tasks)
        indices = [*range(self.tasks), *(self.tasks + index for index in islice(safe, epoch * due, (epoch + 1) * due))]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(indices))
        return [indices[place] for place in order.tolist()]


class EpochSampler:
    """What a DataLoader asks for the order of rows: those of the epoch in which the training is.

    The epoch is asked for, not counted: a run that is resumed begins within a later one.
    """

    def __init__(self, epochs: Epochs, current: Callable[[], int]) -> None:
        self._epochs = epochs
        self._current = current

    def __len__(self) -> int:
        return len(self._epochs)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._epochs.rows(self._current()))
