"""Steering acts while a model trains, and in the passes of the defences whatever the model's mode; nowhere else."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safelora_fast.defenses.steering import Steering
    from safelora_fast.models.anatomy import Anatomy


class TrainingPasses:
    """Knows whether a pass is running that belongs to training."""

    def __init__(self) -> None:
        self._running = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, steering is on whatever the model's mode."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def steer(self, steering: Steering, anatomy: Anatomy, reference: Anatomy | None) -> list[Any]:
        """Steer a model, and a second one that serves as reference; before the hooks that read the outputs.

        Returns:
            The handles that take the hooks out.
        """
        model = anatomy.model
        handles = [steering.install(anatomy, lambda: model.training or self._running > 0)]
        if reference is not None and reference.model is not model:
            handles.append(steering.install(reference, lambda: self._running > 0))
        return handles
