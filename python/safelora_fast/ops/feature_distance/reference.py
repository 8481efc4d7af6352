"""Feature distance written plainly: the definition, for tests in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def feature_distance_reference(
    features: Sequence[torch.Tensor],
    reference_features: Sequence[torch.Tensor],
    mask: torch.Tensor,
    normalize: str = "sequence",
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over blocks and mean over sequences of ‖x − x₀‖²; the arguments are those of `feature_distance`."""
    import torch

    total, sequences = features[0].sum() * 0.0, 0
    for row in range(mask.shape[0]):
        numbers = torch.zeros_like(mask[row], dtype=torch.long) if segments is None else segments[row]
        for number in numbers[mask[row]].unique():
            chosen = mask[row] & (numbers == number)
            sequences += 1
            for block, reference in zip(features, reference_features, strict=True):
                x, y = block[row][chosen], reference[row][chosen]
                if normalize == "sequence":
                    x, y = x / x.norm(), y / y.norm()
                elif normalize == "token":
                    x, y = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
                total = total + (x - y).square().sum()
    return total / max(sequences, 1)
