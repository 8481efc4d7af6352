"""The feature distance as operations of torch.library, so that torch.compile and export see one node without looking in.

Calls that are not compiled do not come here: the dispatcher takes longer than a small distance (benches/test_dispatch.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.ops.backends import choose
from safelora_fast.ops.feature_distance.arguments import Comparison

if TYPE_CHECKING:
    from collections.abc import Sequence

_INPUTS = "Tensor[] features, Tensor[] references, Tensor mask, str normalize, Tensor? segments"


def distance(comparison: Comparison) -> torch.Tensor:
    """The distance as one node of a graph."""
    value: torch.Tensor
    value, _ = _forward(
        list(comparison.features),
        list(comparison.references),
        comparison.mask,
        comparison.normalize,
        comparison.segments,
    )
    return value


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "safelora_fast::feature_distance", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)"
)
def _forward(
    features: Sequence[torch.Tensor],
    references: Sequence[torch.Tensor],
    mask: torch.Tensor,
    normalize: Any,
    segments: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    comparison = Comparison(features, references, mask, normalize, segments)
    value, factors = choose("feature_distance", (*features, *references)).module.forward(comparison)
    return value, factors


@_forward.register_fake  # type: ignore[untyped-decorator]
def _(features: Any, references: Any, mask: Any, normalize: Any, segments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    comparison = Comparison(features, references, mask, normalize, segments)
    value = torch.empty((), dtype=comparison.value_dtype, device=comparison.device)
    return value, comparison.empty_factors()


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "safelora_fast::feature_distance_gradient",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor factors, Tensor gradient) -> Tensor[]",
)
def _gradient(
    features: Sequence[torch.Tensor],
    references: Sequence[torch.Tensor],
    mask: torch.Tensor,
    normalize: Any,
    segments: torch.Tensor | None,
    factors: torch.Tensor,
    gradient: torch.Tensor,
) -> list[torch.Tensor]:
    comparison = Comparison(features, references, mask, normalize, segments)
    module = choose("feature_distance", (*features, *references)).module
    gradients: list[torch.Tensor] = module.backward(comparison, factors, gradient)
    return gradients


@_gradient.register_fake  # type: ignore[untyped-decorator]
def _(
    features: Any, references: Any, mask: Any, normalize: Any, segments: Any, factors: Any, gradient: Any  # noqa: ARG001
) -> list[torch.Tensor]:  # fmt: skip
    return [torch.empty(block.shape, dtype=block.dtype, device=block.device) for block in features]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    features, references, mask, normalize, segments = inputs
    ctx.count, ctx.normalize = len(features), normalize
    ctx.save_for_backward(mask, segments, output[1], *features, *references)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, of_value: torch.Tensor, _: Any) -> tuple[Any, ...]:
    mask, segments, factors, *tensors = ctx.saved_tensors
    features, references = tensors[: ctx.count], tensors[ctx.count :]
    gradients = _gradient(features, references, mask, ctx.normalize, segments, factors, of_value)
    return gradients, [None] * ctx.count, None, None, None


_forward.register_autograd(_backward, setup_context=_keep)
