"""Feature distance by torch operations on one row at a time, with its gradient written out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def feature_distance(
    features: Sequence[torch.Tensor],
    reference_features: Sequence[torch.Tensor],
    mask: torch.Tensor,
    normalize: Literal["sequence", "token", "none"] = "sequence",
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over blocks, mean over sequences, of ‖x − x₀‖² (Kaczér et al., arXiv 2508.06249: LDIFS).

    Never computed as 2 − 2⟨x, x₀⟩, which cancels; its error is at the rounding of the accumulation. Differentiable in
    `features` only.

    Args:
        features: per block, hidden states [batch, tokens, hidden]; float32, bfloat16, float16 or float64.
        reference_features: per block, hidden states of the reference, same shapes.
        mask: [batch, tokens] bool, the tokens that count.
        normalize: what is scaled to unit length: "sequence", each sequence's tokens × hidden; "token", each token;
            "none", nothing.
        segments: [batch, tokens] int; in packed rows, tokens of one row with one number are a sequence. None: each
            row is one.

    Returns:
        A float32 scalar (float64 for float64 features); zero where no token counts.

    Raises:
        ValueError: shapes differ, or `normalize` is unknown.
    """
    if normalize not in {"sequence", "token", "none"}:
        raise ValueError(f'normalize is {normalize!r}, it must be "sequence", "token" or "none"')
    if len(features) != len(reference_features) or not features:
        raise ValueError(f"{len(features)} blocks of features and {len(reference_features)} of reference features")
    for block, reference in zip(features, reference_features, strict=True):
        if block.shape != reference.shape or block.shape[:2] != mask.shape or block.dim() != 3:
            raise ValueError(
                f"features {tuple(block.shape)}, reference {tuple(reference.shape)} and mask {tuple(mask.shape)} "
                "disagree"
            )
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
    mask = mask.to(torch.bool)
    rows = torch.arange(mask.shape[0], device=mask.device)[:, None].expand(mask.shape)
    if segments is not None:
        low = segments.min()
        rows = rows * (segments.max() - low + 1) + (segments - low)
    numbers, inverse = rows[mask].unique(return_inverse=True)
    groups = torch.full(mask.shape, len(numbers), dtype=torch.long, device=mask.device)
    groups[mask] = inverse
    return groups, len(numbers)


class _Distance(torch.autograd.Function):  # type: ignore[misc]
    """One block's distance, summed over sequences; the backward reads both tensors once and writes one."""

    @staticmethod
    def forward(
        ctx: Any, block: torch.Tensor, reference: torch.Tensor, groups: torch.Tensor, sequences: int, normalize: str
    ) -> torch.Tensor:
        exact = torch.float64 if block.dtype == torch.float64 else torch.float32
        sums = torch.stack([_row_sums(h.to(exact), h0.to(exact)) for h, h0 in zip(block, reference, strict=True)])
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
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        block, reference, of_difference, of_block = ctx.saved_tensors
        gradient = torch.empty_like(block)
        for row in range(block.shape[0]):
            h = block[row].to(of_block.dtype)
            difference = h - reference[row].to(of_block.dtype)
            scaled = difference.mul_(of_difference[row][:, None] * gradients[0])
            gradient[row] = scaled.addcmul_(h, of_block[row][:, None] * gradients[0], value=-1.0)
        return gradient, None, None, None, None


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
    known = (p > 0) & (q > 0)
    product = torch.where(known, p * q, torch.ones_like(q))
    gap = torch.where(known, (2 * dot + squared) / torch.where(known, p + q, product), torch.zeros_like(q))
    unknown = ((p > 0) | (q > 0)).to(q.dtype)
    distance = torch.where(known, (squared - gap * gap) / product, unknown)
    of_difference = torch.where(known, 2 / product, torch.zeros_like(q))
    share = (dot + squared) / torch.where(known, p_squared, torch.ones_like(q))
    return distance, of_difference, of_difference * share
