"""Sums of KL and cross-entropy over the tokens, a chunk of them at a time, with the gradient on the way and without autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from safelora_fast.ops.backends import choose
from safelora_fast.ops.linear_kl.counted_tokens import IGNORED_LABEL, Rows
from safelora_fast.ops.linear_kl.head import Chunk, Head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.ops.linear_kl.passes import Given


@dataclass(frozen=True)
class TokenFigures:
    """What the student makes of each label, [batch, tokens] each and without gradient; zero where there is no label.

    Attributes:
        nll: negative log-likelihood.
        entropy: entropy of the next-token distribution.
        is_top1: whether the label is the first choice; of equal ones the first counts.
    """

    nll: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


@dataclass(frozen=True)
class SharedLoss:
    """KL and cross-entropy from the same logits.

    Attributes:
        loss: kl_weight · kl + cross_entropy_weight · cross_entropy, differentiable; float32 (float64 for float64 states).
        kl: sum of the divergence over the tokens in the mask, without gradient.
        cross_entropy: sum of the negative log-likelihood of the labels, without gradient.
        tokens: figures per token, where they were asked for.
    """

    loss: torch.Tensor
    kl: torch.Tensor
    cross_entropy: torch.Tensor
    tokens: TokenFigures | None


def weighted_sums(
    hidden: torch.Tensor,
    reference: torch.Tensor,
    head: Head,
    rows: Rows,
    weights: tuple[torch.Tensor, torch.Tensor],
    gradient: torch.Tensor | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """(loss, Σ KL, Σ NLL, NLL, entropy, hits), the last three by row or None, without autograd.

    The gradient goes into `gradient`, which is zero, where there is one. It is divided by the larger weight, which comes
    first, so that small weights (one over very many tokens) do not underflow in half precision.
    """
    exact = exact_dtype(hidden)
    flat, reference = hidden.flatten(0, -2), reference.to(hidden.device).flatten(0, -2)
    kl_weight, cross_entropy_weight = weights
    size = torch.maximum(kl_weight.abs(), cross_entropy_weight.abs())
    size = torch.where(size > 0, size, torch.ones_like(size))
    given: list[Given] = []
    with torch.autocast(hidden.device.type, enabled=False):
        chunk = Chunk(head, len(rows))
        backend = choose("linear_kl", (flat, reference, head.weight)).module
        passes = backend.Passes(head, rows.settings, chunk.tokens, exact)
        for start in range(0, len(rows), chunk.tokens):
            whole = slice(start, min(start + chunk.tokens, len(rows)))
            chunk.fill(rows.take(flat, whole).to(exact), rows.take(reference, whole).to(exact))
            for block, raw, delta in chunk.blocks(passes.rows):
                part = slice(start + block.start, start + block.stop)
                given.append(passes.block(raw, delta, rows.wanted(part, kl_weight / size, cross_entropy_weight / size)))
            if gradient is not None:
                rows.put(gradient.view(flat.shape), whole, chunk.back().to(gradient.dtype))
    return size, _summed(given, rows, kl_weight, cross_entropy_weight)


def _summed(
    given: list[Given], rows: Rows, kl_weight: torch.Tensor, cross_entropy_weight: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """(loss, Σ KL, Σ NLL, NLL, entropy, hits), the last three by row or None."""

    def joined(name: str) -> torch.Tensor:
        parts = [getattr(block, name) for block in given]
        return torch.cat(parts) if parts else kl_weight.new_zeros(0)

    kl = joined("divergence").masked_fill(~rows.in_mask, 0).sum()
    loss = kl_weight * kl
    if rows.labels is None:
        return loss, kl, None, None, None, None
    labelled = rows.labels != IGNORED_LABEL
    nll = joined("nll").masked_fill(~labelled, 0)
    cross_entropy = nll.sum()
    loss = loss + cross_entropy_weight * cross_entropy
    if not rows.figures:
        return loss, kl, cross_entropy, None, None, None
    entropy = joined("entropy").masked_fill(~labelled, 0)
    return loss, kl, cross_entropy, nll, entropy, labelled & joined("is_top1").to(torch.bool)


def token_figures(rows: Rows, per_row: Sequence[torch.Tensor], shape: Sequence[int]) -> TokenFigures:
    """Figures of the rows as [batch, tokens], with zeros for the others."""
    whole = [torch.zeros(rows.counts.shape, dtype=row.dtype, device=row.device) for row in per_row]
    for flat, row in zip(whole, per_row, strict=True):
        rows.put(flat, slice(None), row)
    return TokenFigures(*(flat.view(shape) for flat in whole))


def exact_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What sums are made in: float32, or float64 for float64 states."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
