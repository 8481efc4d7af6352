"""`defend()`, which attaches defenses to a model in a custom training loop. For existing trainers see `trainers/`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.training.defended import Defended
from safelora_fast.training.loss_terms import Totals

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

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
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Defended:
    """Attach defenses to a model in a custom training loop. Use it as a context manager.

    ```python
    with defend(model, [KL(0.1)], optimizer=optimizer) as defended:
        for window in windows:                              # the micro-batches of one optimizer step
            totals = defended.totals(window)
            for batch in window:
                defended.loss(batch, totals=totals).backward()  # not divided by the number of micro-batches
            optimizer.step()
            optimizer.zero_grad()
    ```

    The loss is scaled for data-parallel training, where gradients are averaged over processes. Accelerate's `backward`
    divides by its own `gradient_accumulation_steps`: multiply the loss by it, or leave it at 1. DeepSpeed's `backward`
    divides too, unless called with `scale_wrt_gas=False`. After the engine's step, call
    :meth:`Defended.engine_stepped`.

    SafeLora(at="end") projects the adapter when the context ends without an exception, or when you call
    :meth:`Defended.finish`. Save the adapter after that.

    Args:
        model: a causal language model of transformers: plain, sharded by `fully_shard`, or wrapped by PEFT,
            DistributedDataParallel or DeepSpeed's engine (ZeRO stages 1 and 2).
        defenses: the defenses; those that are switched off (weight 0) cost nothing.
        optimizer: the optimizer whose steps are counted; required to skip steps, and by defenses with `sample` below 1.
        reference: the reference model of the defenses: "base" (the same model, adapters disabled), the name of a frozen
            adapter of the model, or a second model. "cache:FOLDER" is "base" with its hidden states kept in a folder: later
            epochs, and other runs on the same examples, read them there.
        on_nonfinite: when a defense is NaN or Inf, "raise" `TrainingError` or "skip" the optimizer step.
        first_step: optimizer steps already made, when a run is resumed.
        share_logits: let KL compute the task loss from its own logits, if that loss is the plain cross-entropy of a
            causal model; the model's own head does not run then. Otherwise the losses are computed separately, and the
            log gives the reason. The result is the same.
        monitors: monitors that :meth:`Defended.metrics` reports next to the defenses; they do not change the loss.
        seed: seed of the examples that defenses with `sample` below 1 draw.
        tokenizer: the tokenizer of the batches; required by defenses that look for tokens of its chat template.

    Raises:
        SettingsError: the model, the adapter and the defenses are not compatible.
        DataError: the tokenizer's chat template cannot be used.
        CheckpointError: checkpoints that SafeLora needs at the end are gone or have changed.
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
        seed=seed,
        tokenizer=tokenizer,
    )
