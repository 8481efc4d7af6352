"""Gradients of the feature distance for calls that go to a backend at once, without torch's dispatcher."""

from __future__ import annotations

from typing import Any

import torch

from safelora_fast.ops.feature_distance.arguments import Comparison
from safelora_fast.ops.once_differentiable import differentiable_once


def distance(backend: Any, comparison: Comparison) -> torch.Tensor:
    """The distance by a backend's module, differentiable once, in the features."""
    given: torch.Tensor = _Distance.apply(
        backend,
        comparison.mask,
        comparison.normalize,
        comparison.segments,
        *comparison.features,
        *comparison.references,
    )
    return given


class _Distance(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,
        mask: torch.Tensor,
        normalize: Any,
        segments: torch.Tensor | None,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        count = len(tensors) // 2
        ctx.backend, ctx.normalize = backend, normalize
        comparison = Comparison(tensors[:count], tensors[count:], mask, normalize, segments)
        value: torch.Tensor
        value, factors = backend.forward(comparison)
        ctx.save_for_backward(mask, segments, factors, *tensors)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mask, segments, factors, *tensors = ctx.saved_tensors
        count = len(tensors) // 2
        wanted = [index for index in range(count) if ctx.needs_input_grad[4 + index]]
        comparison = Comparison(tensors[:count], tensors[count:], mask, ctx.normalize, segments)
        if len(wanted) < count:
            comparison, factors = comparison.only(wanted), factors[wanted]
        with torch.no_grad():
            gradients = ctx.backend.backward(comparison, factors, gradient)
        tied = differentiable_once(gradients, [*comparison.features, gradient], owner="feature_distance")
        result: list[torch.Tensor | None] = [None] * (4 + 2 * count)
        for index, of_block in zip(wanted, tied, strict=True):
            result[4 + index] = of_block
        return tuple(result)
