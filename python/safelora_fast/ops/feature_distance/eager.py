"""Feature distance by torch operations on one row at a time, with its gradient written out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from safelora_fast.ops.feature_distance.once import differentiable_once

if TYPE_CHECKING:
    from collections.abc import Sequence


def feature_distance(
    features: Sequence[torch.Tensor],
    reference_features: Sequence[torch.Tensor],
    mask: torch.Tensor,
    normalize: Literal["sequence", "token", "none"],
    segments: torch.Tensor | None,
) -> torch.Tensor:
    """The distance, with sums in float32 (float64 for float64 features)."""
    groups, sequences = _groups(mask, segments)
    total = None
    for block, reference in zip(features, reference_features, strict=True):
        device = block.device
        distance = _Distance.apply(block, reference.detach().to(device), groups.to(device), sequences, normalize)
        total = distance if total is None else total + distance.to(total.device)
    assert total is not None  # noqa: S101
    return total / max(sequences, 1)


def _groups(mask: torch.Tensor, segments: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """Per token the number of its sequence, or the number of sequences where the token does not count."""
    rows = torch.arange(mask.shape[0], device=mask.device)[:, None].expand(mask.shape)
    if segments is not None and segments.numel():
        low = segments.min()
        rows = rows * (segments.max() - low + 1) + (segments - low)
    numbers, inverse = rows[mask].unique(return_inverse=True)
    groups = torch.full(mask.shape, len(numbers), dtype=torch.long, device=mask.device)
    groups[mask] = inverse
    return groups, len(numbers)


class _Distance(torch.autograd.Function):  # type: ignore[misc]
    """One block's distance, summed over sequences."""

    @staticmethod
    def forward(
        ctx: Any, block: torch.Tensor, reference: torch.Tensor, groups: torch.Tensor, sequences: int, normalize: str
    ) -> torch.Tensor:
        exact = torch.float64 if block.dtype == torch.float64 else torch.float32
        sums = torch.empty((block.shape[0], 3, block.shape[1]), dtype=exact, device=block.device)
        for row in range(block.shape[0]):
            sums[row] = _row_sums(block[row].to(exact), reference[row].to(exact))
        squared, dot, norm = sums.unbind(1)  # [batch, tokens]: ‖d‖², ⟨d, h₀⟩, ‖h₀‖²
        if normalize == "sequence":
            squared, dot, norm = (_summed(values, groups, sequences) for values in (squared, dot, norm))
        if normalize == "none":
            distance, of_difference, of_block = squared, torch.full_like(squared, 2.0), torch.zeros_like(squared)
        else:
            distance, of_difference, of_block = _unit_distance(squared, dot, norm)
        if normalize == "sequence":
            distance = distance[:-1]
            of_difference, of_block = of_difference[groups], of_block[groups]
        counted = groups < sequences
        zero = torch.zeros((), dtype=exact, device=block.device)
        ctx.save_for_backward(
            block, reference, torch.where(counted, of_difference, zero), torch.where(counted, of_block, zero)
        )
        return distance.sum() if normalize == "sequence" else torch.where(counted, distance, zero).sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        block, reference, of_difference, of_block = ctx.saved_tensors
        with torch.no_grad():
            of_features = _gradient(block, reference, of_difference, of_block, gradient)
        (of_features,) = differentiable_once([of_features], [block, gradient])
        return of_features, None, None, None, None


def _gradient(
    block: torch.Tensor,
    reference: torch.Tensor,
    of_difference: torch.Tensor,
    of_block: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    gradient = torch.empty_like(block)
    for row in range(block.shape[0]):
        h = block[row].to(of_block.dtype)
        difference = h - reference[row].to(of_block.dtype)
        scaled = difference.mul_(of_difference[row][:, None] * weight)
        scaled.addcmul_(h, of_block[row][:, None] * weight, value=-1.0)
        gradient[row] = scaled.masked_fill_((of_difference[row] == 0)[:, None], 0.0)
    return gradient


def _row_sums(h: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """[3, tokens]: ‖d‖², ⟨d, h₀⟩ and ‖h₀‖² with d = h − h₀."""
    difference = h - reference
    return torch.stack(
        [(difference * difference).sum(-1), (difference * reference).sum(-1), (reference * reference).sum(-1)]
    )


def _summed(values: torch.Tensor, groups: torch.Tensor, sequences: int) -> torch.Tensor:
    """Sums over the tokens of each sequence; the last entry collects what does not count."""
    result = torch.zeros(sequences + 1, dtype=values.dtype, device=values.device)
    return result.index_add_(0, groups.flatten(), values.flatten())


def _unit_distance(
    squared: torch.Tensor, dot: torch.Tensor, norm: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distance of the unit vectors, and the factors of d and h in its gradient.

    With p = ‖h‖ and q = ‖h₀‖: (‖d‖² − (p − q)²)/(pq), gradient 2/(pq)·(d − ((⟨d, h₀⟩ + ‖d‖²)/p²)·h). A zero vector has
    no direction: its unit vector counts as zero, and its gradient too.
    """
    q = norm.sqrt()
    p_squared = (norm + 2 * dot + squared).clamp(min=0)
    p = p_squared.sqrt()
    known = (p != 0) & ((q != 0) | p.isnan())  # so that NaN shows
    product = torch.where(known, p * q, torch.ones_like(q))
    gap = torch.where(known, (2 * dot + squared) / torch.where(known, p + q, product), torch.zeros_like(q))
    unknown = (p != q).to(q.dtype)
    distance = torch.where(known, (squared - gap * gap) / product, unknown)
    of_difference = torch.where(known, 2 / product, torch.zeros_like(q))
    share = (dot + squared) / torch.where(known, p_squared, torch.ones_like(q))
    return distance, of_difference, of_difference * share
