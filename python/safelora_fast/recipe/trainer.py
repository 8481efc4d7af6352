"""The trainer of the train command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast.integrations.trl import DefendedSFTTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator


class RecipeTrainer(DefendedSFTTrainer):
    """DefendedSFTTrainer that makes no step beyond the last when it resumes from the last checkpoint.

    A run whose last step lies within an epoch would otherwise take up that epoch again.
    """

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any, **kwargs: Any
    ) -> tuple[list[Any], Any]:
        """The micro-batches of one optimiser step; none when all steps are made."""
        if self.state.global_step >= self.state.max_steps > 0:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
