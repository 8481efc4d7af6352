"""Gradients that must not be differentiated again: their factors are constants to autograd, though they are none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def differentiable_once(
    gradients: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], *, owner: str
) -> Sequence[torch.Tensor]:
    """The gradients; where a graph of them is recorded, tied to `inputs` by a node that raises RuntimeError.

    Args:
        gradients: what a backward gives.
        inputs: tensors that the gradients depend on.
        owner: the operation, for the message.
    """
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in inputs):
        return gradients
    tied: Sequence[torch.Tensor] = _Once.apply(owner, len(gradients), *gradients, *inputs)
    return tied


class _Once(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, owner: str, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.owner = owner
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ARG004
        raise RuntimeError(
            f"{ctx.owner} has no second derivative: leave out create_graph, or take its loss out of the part that is "
            "differentiated twice"
        )
