"""Measuring a model's drift from its reference: loss and divergence on completions, from full float32 logits.

The measure uses no defense and no kernel, so it does not depend on the code that it evaluates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.data.tokens import IGNORED_LABEL
from safelora_fast.errors import SettingsError
from safelora_fast.models.reference_pass import evaluation_mode
from safelora_fast.scoring.sequences import batches_by_length, padded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from safelora_fast.scoring.sequences import Labelled

TOKENS_PER_BATCH = 1024


@dataclass(frozen=True)
class AnswerDrift:
    """Sums over the tokens of one completion, end of turn included, in nats.

    Attributes:
        tokens: number of tokens.
        loss: negative log-likelihood.
        divergence: KL(model ‖ reference) over the whole vocabulary; 0 without a reference.
    """

    tokens: int
    loss: float
    divergence: float


def answer_drift(
    model: nn.Module,
    reference: nn.Module | None,
    examples: Sequence[Labelled],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Callable[[int], None] | None = None,
) -> list[AnswerDrift]:
    """Compute the loss of every completion under a model, and the model's divergence from a reference model.

    Args:
        model: a causal language model, with or without an adapter.
        reference: the model before fine-tuning, on the same device; None to compute only the loss.
        examples: prompts with completions.
        tokens_per_batch: maximum number of tokens in a batch, padding included. Memory must hold both models' logits of
            a batch.
        progress: called with the number of completions done so far.

    Raises:
        SettingsError: a batch does not fit in the device's memory, or the two models have different vocabularies.
    """
    found: dict[int, AnswerDrift] = {}
    for indices in batches_by_length([len(example.ids) for example in examples], tokens_per_batch):
        try:
            found.update(zip(indices, _batch(model, reference, [examples[index] for index in indices]), strict=True))
        except torch.OutOfMemoryError as error:
            raise SettingsError(f"out of memory with {tokens_per_batch} tokens in a batch: ask for fewer") from error
        if progress is not None:
            progress(len(found))
    return [found[index] for index in range(len(examples))]


def _batch(model: nn.Module, reference: nn.Module | None, examples: list[Labelled]) -> list[AnswerDrift]:
    batch, labels = padded(examples, next(model.parameters()).device)
    where = labels != IGNORED_LABEL
    targets, counts = labels[where], where.sum(dim=1).tolist()
    with torch.no_grad():
        own = _predictions(model, batch, where)
        divergence = torch.zeros(len(targets), dtype=torch.float64)
        if reference is not None:
            other = _predictions(reference, batch, where)
            if own.shape != other.shape:
                raise SettingsError(
                    f"the model's vocabulary has {own.shape[-1]} tokens and its reference's {other.shape[-1]}: "
                    "no divergence is defined"
                )
            divergence = (own.exp() * (own - other)).sum(dim=-1, dtype=torch.float64).cpu()
        loss = -own.gather(-1, targets[:, None])[:, 0].double().cpu()
    parts = zip(counts, loss.split(counts), divergence.split(counts), strict=True)
    return [AnswerDrift(count, losses.sum().item(), drifted.sum().item()) for count, losses, drifted in parts]


def _predictions(model: nn.Module, batch: dict[str, torch.Tensor], where: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities at positions that predict a completion, [completion tokens, vocabulary], float32."""
    with evaluation_mode(model):
        output: Any = model(**batch, use_cache=False)
    logits: torch.Tensor = output.logits[:, -where.shape[1] :]  # a learned prompt precedes them
    return logits[where.to(logits.device)].float().log_softmax(-1)
