"""The divergence as an operation of torch.library, so that torch.compile and export see one node without looking in.

Calls that are not compiled do not come here. The tokens that count are known at run time only, which is why compiled code
could not look in.
"""

from __future__ import annotations

from typing import Any

import torch

from safelora_fast.ops.linear_kl.fused import summed_divergence
from safelora_fast.ops.linear_kl.head import Head
from safelora_fast.ops.linear_kl.passes import Settings


def divergence(
    hidden: torch.Tensor, reference: torch.Tensor, head: Head, mask: torch.Tensor, settings: Settings
) -> torch.Tensor:
    """Sum of the divergence over the tokens in `mask` as one node of a graph, differentiable once, in `hidden`."""
    total: torch.Tensor
    total, _ = _forward(
        hidden, reference.detach(), head.weight, head.bias, mask, settings.forward, settings.temperature, head.scale,
        head.softcap, hidden.requires_grad and torch.is_grad_enabled(),
    )  # fmt: skip
    return total


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "safelora_fast::linear_kl",
    mutates_args=(),
    schema="(Tensor hidden, Tensor reference, Tensor weight, Tensor? bias, Tensor mask, bool forward, float temperature, "
    "float scale, float? softcap, bool differentiable) -> (Tensor, Tensor)",
)
def _forward(
    hidden: torch.Tensor,
    reference: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor,
    forward: bool,
    temperature: float,
    scale: float,
    softcap: float | None,
    differentiable: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    gradient = _like(hidden, differentiable).zero_()
    settings, head = Settings(forward, temperature), Head(weight, bias, scale, softcap)
    total = summed_divergence(hidden, reference, head, mask, settings, gradient if differentiable else None)
    return total, gradient


@_forward.register_fake  # type: ignore[untyped-decorator]
def _(hidden: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return torch.empty((), dtype=exact, device=hidden.device), _like(hidden, rest[-1])


def _like(hidden: torch.Tensor, differentiable: bool) -> torch.Tensor:
    return torch.empty(hidden.shape if differentiable else (0,), dtype=hidden.dtype, device=hidden.device)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, of_total: torch.Tensor, _: Any) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    return ((gradient * of_total).to(gradient.dtype), *[None] * 9)


_forward.register_autograd(_backward, setup_context=_keep)
