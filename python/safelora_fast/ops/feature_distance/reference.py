"""Feature distance written plainly: the definition, for tests in float64, and the backend that computes in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.ops.feature_distance.arguments import Comparison


def feature_distance_reference(
    features: Sequence[torch.Tensor],
    reference_features: Sequence[torch.Tensor],
    mask: torch.Tensor,
    normalize: str = "sequence",
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over blocks and mean over sequences of ‖x − x₀‖²; the arguments are those of `feature_distance`."""
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


def refusal(tensors: Sequence[torch.Tensor]) -> str | None:  # noqa: ARG001
    """None: torch computes this anywhere."""
    return None


def forward(comparison: Comparison) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition; the factors are not used."""
    value = _definition(comparison, _in_float64(comparison, comparison.features))
    return value.to(comparison.value_dtype), comparison.empty_factors().zero_()


def backward(comparison: Comparison, factors: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:  # noqa: ARG001
    """Its gradient, by autograd."""
    features = [block.requires_grad_() for block in _in_float64(comparison, comparison.features)]
    with torch.enable_grad():
        value = _definition(comparison, features)
        gradients = torch.autograd.grad(value, features, gradient.to(value))
    return [exact.to(block).contiguous() for exact, block in zip(gradients, comparison.features, strict=True)]


def _definition(comparison: Comparison, features: list[torch.Tensor]) -> torch.Tensor:
    mask = comparison.mask.to(comparison.device)
    segments = None if comparison.segments is None else comparison.segments.to(comparison.device)
    references = _in_float64(comparison, comparison.references)
    return feature_distance_reference(features, references, mask, comparison.normalize, segments)


def _in_float64(comparison: Comparison, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Without what stands in tokens that do not count, which may be NaN."""
    mask = comparison.mask.to(comparison.device)[..., None]
    return [torch.where(mask, tensor.detach().to(comparison.device, torch.float64), 1.0) for tensor in tensors]
