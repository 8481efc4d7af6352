"""KL and cross-entropy from hidden states as functions of torch, with the gradient computed in the forward."""

from __future__ import annotations

from typing import Any, Literal

import torch

from safelora_fast.ops.linear_kl import library
from safelora_fast.ops.linear_kl.chunked import SharedLoss, exact_dtype, token_figures, weighted_sums
from safelora_fast.ops.linear_kl.counted_tokens import Rows
from safelora_fast.ops.linear_kl.head import Head
from safelora_fast.ops.linear_kl.passes import Settings
from safelora_fast.ops.once_differentiable import differentiable_once
from safelora_fast.ops.operands import require_tensors

Direction = Literal["reverse", "forward"]


def linear_kl(
    hidden: torch.Tensor,
    reference_hidden: torch.Tensor,
    head_weight: torch.Tensor,
    mask: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    direction: Direction = "reverse",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Mean over tokens of the KL divergence between the next-token distributions of two hidden states.

    Logits are softcap(logit_scale · (h·Wᵀ + bias))/temperature. They are made a chunk of tokens at a time, of the
    reference and of the difference W(h − h₀), so that nothing cancels while both are close; the gradient with respect
    to `hidden` is computed on the way, and only that is kept. There is none for W, the bias or the reference.

    Args:
        hidden: [batch, tokens, hidden] of the student; float32, bfloat16, float16 or float64.
        reference_hidden: the same of the reference.
        head_weight: W [vocabulary, hidden], shared; used in the dtype of `hidden`, or of autocast where that is on, as
            a linear layer would be. Everything else is float32 (float64 for float64 states).
        mask: [batch, tokens] bool, the tokens that count.
        bias: [vocabulary].
        direction: "reverse" is KL(student ‖ reference), "forward" is KL(reference ‖ student).
        temperature: divides the logits.
        logit_scale: multiplies the logits before the soft-cap.
        softcap: c of c·tanh(logits/c).

    Returns:
        A float32 scalar (float64 for float64 states); zero where no token counts.

    Raises:
        ValueError: shapes or dtypes do not fit, `direction` is unknown, temperature or soft-cap is not positive.
        RuntimeError: a gradient of the gradient is asked for.
    """
    _check(hidden, reference_hidden, head_weight, mask, direction)
    _check_head(head_weight, bias, temperature, softcap)
    head = _head(hidden, head_weight, bias, logit_scale, softcap)
    mask, settings = mask.to(hidden.device, torch.bool), Settings(direction == "forward", temperature)
    if torch.compiler.is_compiling():
        total = library.divergence(hidden, reference_hidden, head, mask, settings)
        return total / mask.sum().clamp(min=1)
    rows = Rows.of(mask.flatten(), None, settings)
    one = torch.ones((), dtype=exact_dtype(hidden), device=hidden.device)
    total, *_ = _LinearLoss.apply(hidden, _anchor(hidden), reference_hidden.detach(), head, rows, one, one)
    return total / (mask.sum().clamp(min=1) if rows.positions is None else max(len(rows), 1))


def linear_kl_cross_entropy(
    hidden: torch.Tensor,
    reference_hidden: torch.Tensor,
    head_weight: torch.Tensor,
    mask: torch.Tensor,
    labels: torch.Tensor,
    *,
    kl_weight: torch.Tensor | float,
    cross_entropy_weight: torch.Tensor | float,
    bias: torch.Tensor | None = None,
    direction: Direction = "reverse",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    figures: bool = False,
) -> SharedLoss:
    """The divergence of :func:`linear_kl` and the task's cross-entropy, both from one set of the student's logits.

    The weights are those that the sums have in the loss (λ over the number of tokens, one over the number of labels):
    with them known in the forward, one product with W gives the gradient of both, and one [batch, tokens, hidden]
    tensor keeps it. Apart they would take two products and two tensors.

    Args:
        hidden: as in :func:`linear_kl`, like the arguments that are not named here.
        reference_hidden: likewise.
        head_weight: likewise.
        mask: [batch, tokens] bool, the tokens whose divergence counts.
        labels: [batch, tokens], at each position the token that follows; -100 where none counts.
        kl_weight: factor of the sum of the divergence, a number or a scalar tensor.
        cross_entropy_weight: factor of the sum of the negative log-likelihood, likewise.
        bias: [vocabulary].
        direction: as in :func:`linear_kl`.
        temperature: divides the logits of the divergence; the cross-entropy has none.
        logit_scale: multiplies the logits before the soft-cap.
        softcap: c of c·tanh(logits/c).
        figures: whether to give `tokens` too: two more passes over the logits.

    Raises:
        ValueError: as :func:`linear_kl`.
        RuntimeError: a gradient of the gradient is asked for.
    """
    _check(hidden, reference_hidden, head_weight, mask, direction)
    _check_head(head_weight, bias, temperature, softcap)
    if labels.shape != mask.shape:
        raise ValueError(f"labels {tuple(labels.shape)} and mask {tuple(mask.shape)} disagree")
    head = _head(hidden, head_weight, bias, logit_scale, softcap)
    mask, labels = mask.to(hidden.device, torch.bool).flatten(), labels.to(hidden.device).flatten()
    weights = [_scalar(weight, hidden) for weight in (kl_weight, cross_entropy_weight)]
    settings = Settings(direction == "forward", temperature)
    if torch.compiler.is_compiling():
        return library.shared_loss(hidden, reference_hidden, head, mask, labels, settings, *weights, figures=figures)
    rows = Rows.of(mask, labels, settings, figures=figures)
    loss, kl, cross_entropy, *per_row = _LinearLoss.apply(
        hidden, _anchor(hidden), reference_hidden.detach(), head, rows, *weights
    )
    return SharedLoss(loss, kl, cross_entropy, token_figures(rows, per_row, hidden.shape[:-1]) if figures else None)


def _check(
    hidden: torch.Tensor, reference: torch.Tensor, head_weight: torch.Tensor, mask: torch.Tensor, direction: str
) -> None:
    require_tensors(hidden=hidden, reference_hidden=reference, head_weight=head_weight, mask=mask)
    if direction not in {"reverse", "forward"}:
        raise ValueError(f'direction is {direction!r}, it must be "reverse" or "forward"')
    if not (hidden.is_floating_point() and reference.is_floating_point()):
        raise ValueError(f"hidden is {hidden.dtype}, reference {reference.dtype}: they must be floats")
    if mask.is_floating_point():
        raise ValueError(f"mask is {mask.dtype}: it must say of each token whether it counts, not how much")
    if hidden.shape != reference.shape or hidden.shape[:-1] != mask.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, reference {tuple(reference.shape)} and mask {tuple(mask.shape)} disagree"
        )
    if head_weight.shape[-1] != hidden.shape[-1]:
        raise ValueError(f"the head has width {head_weight.shape[-1]}, the hidden states {hidden.shape[-1]}")


def _check_head(weight: torch.Tensor, bias: torch.Tensor | None, temperature: float, softcap: float | None) -> None:
    if weight.dim() != 2 or not len(weight):
        raise ValueError(f"the head has shape {tuple(weight.shape)}, it must be [vocabulary, hidden]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"the head has {len(weight)} rows, but a bias of shape {tuple(bias.shape)}")
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}, it must be positive")


def _anchor(hidden: torch.Tensor) -> torch.Tensor:
    """Nothing at all, but made from `hidden`: what the gradient is tied to without keeping the states in memory."""
    return hidden.narrow(0, 0, 0).clone()


def _scalar(value: torch.Tensor | float, hidden: torch.Tensor) -> torch.Tensor:
    """A weight on the device; filled in there if it is a number, since a copy would have to be waited for."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(hidden.device, exact_dtype(hidden))
    return torch.full((), value, dtype=exact_dtype(hidden), device=hidden.device)


def _head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float | None
) -> Head:
    kind, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    weight = weight.detach().to(hidden.device, dtype)
    return Head(weight, None if bias is None else bias.detach(), scale, softcap)


class _LinearLoss(torch.autograd.Function):  # type: ignore[misc]
    """Both weighted sums over the tokens; the gradient is computed in the forward, where the logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        anchor: torch.Tensor,
        reference: torch.Tensor,
        head: Head,
        rows: Rows,
        kl_weight: torch.Tensor,
        cross_entropy_weight: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        size, (loss, *figures) = weighted_sums(
            hidden, reference, head, rows, (kl_weight, cross_entropy_weight), gradient
        )
        if gradient is not None:
            ctx.save_for_backward(gradient, size, anchor)
        ctx.mark_non_differentiable(*(figure for figure in figures if figure is not None))
        return (loss, *figures)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, size, anchor = ctx.saved_tensors
        scaled = (gradient * (gradients[0] * size)).to(gradient.dtype)
        (tied,) = differentiable_once([scaled], [anchor, gradients[0]], owner="linear_kl")
        return tied, None, None, None, None, None, None
