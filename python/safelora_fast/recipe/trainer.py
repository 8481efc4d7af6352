"""The trainer of the train command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast.data.schedule import EpochSampler
from safelora_fast.trainers.trl import DefendedSFTTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safelora_fast.data.schedule import Epochs


class RecipeTrainer(DefendedSFTTrainer):
    """DefendedSFTTrainer that makes no step beyond the last when it resumes from the last checkpoint, and whose epochs differ.

    A run whose last step lies within an epoch would otherwise take up that epoch again.

    Args:
        epochs: rows of each epoch, as indices into the training data; None leaves that to the arguments.
    """

    def __init__(self, *args: Any, epochs: Epochs | None = None, **kwargs: Any) -> None:
        self._epochs = epochs
        super().__init__(*args, **kwargs)

    def tell_of_checkpoints(self) -> None:
        """Nothing: the recipe's folder holds the projected adapter, and its card says so."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self._epochs is None:
            return super()._get_train_sampler(*args, **kwargs)
        return EpochSampler(self._epochs, lambda: int(self.state.epoch or 0))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any, **kwargs: Any
    ) -> tuple[list[Any], Any]:
        """The micro-batches of one optimiser step; none when all steps are made."""
        if self.state.global_step >= self.state.max_steps > 0:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
