"""Attaching defenses to a model in training: `defend()` for loops of your own; trainers/ does it in those of other libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.training.defended import Defended
from safelora_fast.training.loss_terms import Totals

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from safelora_fast.defenses import Defense, DriftMonitor
    from safelora_fast.models.reference_pass import Reference
    from safelora_fast.training.optimizer_steps import OnNonFinite

__all__ = ["Defended", "Totals", "defend"]


def defend(
    model: nn.Module,
    defenses: Sequence[Defense],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    reference: Reference = "base",
    on_nonfinite: OnNonFinite = "raise",
    first_step: int = 0,
    share_logits: bool = True,
    monitors: Sequence[DriftMonitor] = (),
) -> Defended:
    """Attach defenses to a model for a training loop of your own; a context manager.

    ```python
    with defend(model, [KL(0.1)], optimizer=optimizer) as defended:
        for window in windows:                              # the micro-batches of one optimizer step
            totals = defended.totals(window)
            for batch in window:
                defended.loss(batch, totals=totals).backward()  # not divided by the number of micro-batches
            optimizer.step()
            optimizer.zero_grad()
    ```

    The loss is right for data-parallel training, where gradients are averaged over processes. Accelerate's
    `backward` divides by its own `gradient_accumulation_steps`: multiply the loss by it, or leave it at 1. So does
    DeepSpeed's, unless it is told `scale_wrt_gas=False`; after the engine's step call :meth:`Defended.engine_stepped`.

    SafeLora at the end projects the adapter when the context ends without an exception, or earlier by
    :meth:`Defended.finish`: save the adapter after that.

    Args:
        model: a causal language model of transformers, plain, sharded by `fully_shard`, or wrapped by PEFT,
            DistributedDataParallel and DeepSpeed's engine (ZeRO stages 1 and 2).
        defenses: the defenses; those that are switched off (weight 0) cost nothing.
        optimizer: the optimizer whose steps are counted; needed to skip a step.
        reference: the model that the defenses keep the model near: "base" (the same model, adapters disabled), the name
            of a frozen adapter of the model, or a second model.
        on_nonfinite: when a defense is NaN or infinite, "raise" `TrainingError` or "skip" the optimizer step.
        first_step: optimizer steps already made, when a run is resumed.
        share_logits: let KL compute the task's loss too, from the same logits, where that is the plain cross-entropy of a
            causal model; the model's own head does not run then. Elsewhere the losses are computed separately, and the
            log says why. The result is the same.
        monitors: what :meth:`Defended.metrics` reports beside the defenses; they change no loss.

    Raises:
        SettingsError: the model, the adapter and the defenses do not go together.
        CheckpointError: the checkpoints that SafeLora needs at the end are gone, or have changed.
    """
    return Defended(
        model,
        defenses,
        optimizer=optimizer,
        reference=reference,
        on_nonfinite=on_nonfinite,
        first_step=first_step,
        share_logits=share_logits,
        monitors=monitors,
    )
