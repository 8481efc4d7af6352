"""The losses as operations of torch.library, so that torch.compile and export see one node without looking in.

Calls that are not compiled do not come here. The tokens that count are known at run time only, which is why compiled code
could not look in.
"""

from __future__ import annotations

from typing import Any

import torch

from safelora_fast.ops.linear_kl.chunked import SharedLoss, TokenFigures, exact_dtype, token_figures, weighted_sums
from safelora_fast.ops.linear_kl.counted_tokens import Rows
from safelora_fast.ops.linear_kl.head import Head
from safelora_fast.ops.linear_kl.passes import Settings

_STATES = "Tensor hidden, Tensor reference, Tensor weight, Tensor? bias, Tensor mask"
_SETTINGS = "bool forward, float temperature, float scale, float? softcap"


def divergence(
    hidden: torch.Tensor, reference: torch.Tensor, head: Head, mask: torch.Tensor, settings: Settings
) -> torch.Tensor:
    """Sum of the divergence over the tokens in `mask` as one node of a graph, differentiable once, in `hidden`."""
    total: torch.Tensor
    total, _ = _divergence(
        hidden, reference.detach(), head.weight, head.bias, mask, settings.forward, settings.temperature, head.scale,
        head.softcap, hidden.requires_grad and torch.is_grad_enabled(),
    )  # fmt: skip
    return total


def shared_loss(
    hidden: torch.Tensor,
    reference: torch.Tensor,
    head: Head,
    mask: torch.Tensor,
    labels: torch.Tensor,
    settings: Settings,
    kl_weight: torch.Tensor,
    cross_entropy_weight: torch.Tensor,
    *,
    figures: bool,
) -> SharedLoss:
    """Both losses as one node of a graph, differentiable once, in `hidden`; mask and labels are flat."""
    loss, kl, cross_entropy, nll, entropy, is_top1, *_ = _shared_loss(
        hidden, reference.detach(), head.weight, head.bias, mask, labels, kl_weight, cross_entropy_weight,
        settings.forward, settings.temperature, head.scale, head.softcap, figures,
        hidden.requires_grad and torch.is_grad_enabled(),
    )  # fmt: skip
    return SharedLoss(loss, kl, cross_entropy, TokenFigures(nll, entropy, is_top1) if figures else None)


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "safelora_fast::linear_kl",
    mutates_args=(),
    schema=f"({_STATES}, {_SETTINGS}, bool differentiable) -> (Tensor, Tensor)",
)
def _divergence(
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
    head, rows = Head(weight, bias, scale, softcap), Rows.of(mask.flatten(), None, Settings(forward, temperature))
    one = torch.ones((), dtype=exact_dtype(hidden), device=hidden.device)
    _, (total, *_) = weighted_sums(hidden, reference, head, rows, (one, one), gradient if differentiable else None)
    assert total is not None  # noqa: S101
    return total, gradient


@_divergence.register_fake  # type: ignore[untyped-decorator]
def _(hidden: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty((), dtype=exact_dtype(hidden), device=hidden.device), _like(hidden, rest[-1])


def _keep_gradient(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _scaled_gradient(ctx: Any, of_total: torch.Tensor, _: Any) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    return ((gradient * of_total).to(gradient.dtype), *[None] * 9)


_divergence.register_autograd(_scaled_gradient, setup_context=_keep_gradient)


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "safelora_fast::linear_kl_cross_entropy",
    mutates_args=(),
    schema=f"({_STATES}, Tensor labels, Tensor kl_weight, Tensor cross_entropy_weight, {_SETTINGS}, bool figures, "
    f"bool differentiable) -> ({', '.join(['Tensor'] * 8)})",
)
def _shared_loss(
    hidden: torch.Tensor,
    reference: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor,
    labels: torch.Tensor,
    kl_weight: torch.Tensor,
    cross_entropy_weight: torch.Tensor,
    forward: bool,
    temperature: float,
    scale: float,
    softcap: float | None,
    figures: bool,
    differentiable: bool,
) -> tuple[torch.Tensor | None, ...]:
    gradient = _like(hidden, differentiable).zero_()
    head, rows = (
        Head(weight, bias, scale, softcap),
        Rows.of(mask, labels, Settings(forward, temperature), figures=figures),
    )
    weights = kl_weight, cross_entropy_weight
    size, (*sums, nll, entropy, is_top1) = weighted_sums(
        hidden, reference, head, rows, weights, gradient if differentiable else None
    )
    tokens = _figures(hidden, 0)
    if nll is not None and entropy is not None and is_top1 is not None:
        found = token_figures(rows, (nll, entropy, is_top1), hidden.shape[:-1])
        tokens = found.nll, found.entropy, found.is_top1
    return (*sums, *tokens, gradient, size)


@_shared_loss.register_fake  # type: ignore[untyped-decorator]
def _(hidden: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
    figures, differentiable = rest[-2:]
    sums = [torch.empty((), dtype=exact_dtype(hidden), device=hidden.device) for _ in range(4)]
    tokens = _figures(hidden, *(hidden.shape[:-1] if figures else [0]))
    return (*sums[:3], *tokens, _like(hidden, differentiable), sums[3])


def _keep_weighted(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(*output[-2:])
    ctx.mark_non_differentiable(*output[1:])


def _weighted_gradient(ctx: Any, of_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    gradient, size = ctx.saved_tensors
    return ((gradient * (of_loss * size)).to(gradient.dtype), *[None] * 13)


_shared_loss.register_autograd(_weighted_gradient, setup_context=_keep_weighted)


def _like(hidden: torch.Tensor, differentiable: bool) -> torch.Tensor:
    return torch.empty(hidden.shape if differentiable else (0,), dtype=hidden.dtype, device=hidden.device)


def _figures(hidden: torch.Tensor, *shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtypes = exact_dtype(hidden), exact_dtype(hidden), torch.bool
    nll, entropy, is_top1 = (torch.empty(shape, dtype=dtype, device=hidden.device) for dtype in dtypes)
    return nll, entropy, is_top1
