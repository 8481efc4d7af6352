"""KL and cross-entropy from hidden states, a chunk of tokens at a time, with the gradient computed in the forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from safelora_fast.ops.backends import choose
from safelora_fast.ops.linear_kl.head import Chunk, Head
from safelora_fast.ops.linear_kl.passes import Given, Settings, Wanted
from safelora_fast.ops.once import differentiable_once

Direction = Literal["reverse", "forward"]
IGNORED_LABEL = -100


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
    mask = mask.to(hidden.device, torch.bool)
    if torch.compiler.is_compiling():
        from safelora_fast.ops.linear_kl import library

        total = library.divergence(hidden, reference_hidden, head, mask, Settings(direction == "forward", temperature))
        return total / mask.sum().clamp(min=1)
    rows = mask.flatten().nonzero().squeeze(-1)
    plan = _Plan(rows, mask.flatten()[rows], None, direction == "forward", temperature, figures=False)
    one = torch.ones((), dtype=_exact(hidden), device=hidden.device)
    loss, *_ = _LinearLoss.apply(hidden, _anchor(hidden), reference_hidden.detach(), head, plan, one, one)
    total = loss
    return total / max(len(rows), 1)


@dataclass(frozen=True)
class TokenFigures:
    """What the student makes of each label, [batch, tokens] each and without gradient; zero where there is no label.

    Attributes:
        nll: negative log-likelihood.
        entropy: entropy of the next-token distribution.
        is_top1: whether the label is the first choice; of equal ones the first counts.
    """

    nll: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


@dataclass(frozen=True)
class SharedLoss:
    """KL and cross-entropy from the same logits.

    Attributes:
        loss: kl_weight · kl + cross_entropy_weight · cross_entropy, differentiable; float32 (float64 for float64 states).
        kl: sum of the divergence over the tokens in the mask, without gradient.
        cross_entropy: sum of the negative log-likelihood of the labels, without gradient.
        tokens: figures per token, where they were asked for.
    """

    loss: torch.Tensor
    kl: torch.Tensor
    cross_entropy: torch.Tensor
    tokens: TokenFigures | None


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
    rows = (mask | (labels != IGNORED_LABEL)).nonzero().squeeze(-1)
    plan = _Plan(rows, mask[rows], labels[rows], direction == "forward", temperature, figures)
    weights = [
        torch.as_tensor(weight, dtype=_exact(hidden), device=hidden.device).detach()
        for weight in (kl_weight, cross_entropy_weight)
    ]
    loss, kl, cross_entropy, *per_row = _LinearLoss.apply(
        hidden, _anchor(hidden), reference_hidden.detach(), head, plan, *weights
    )
    tokens = None
    if figures:
        whole = (torch.zeros(labels.shape, dtype=row.dtype, device=row.device) for row in per_row)
        tokens = TokenFigures(
            *(flat.index_copy_(0, rows, row).view(hidden.shape[:-1]) for flat, row in zip(whole, per_row, strict=True))
        )
    return SharedLoss(loss, kl, cross_entropy, tokens)


@dataclass(frozen=True)
class _Plan:
    """The tokens that are computed: their flat indices, which of them the divergence counts, and their labels."""

    rows: torch.Tensor
    in_mask: torch.Tensor
    labels: torch.Tensor | None
    forward: bool
    temperature: float
    figures: bool

    def wanted(self, part: slice, divergence: torch.Tensor, label: torch.Tensor) -> Wanted:
        """What the rows of `part` are asked for, with the factors that both losses have in the gradient."""
        of_divergence = (self.in_mask[part] * divergence)[:, None]
        if self.labels is None:
            return Wanted(of_divergence)
        labels = self.labels[part]
        of_label = ((labels != IGNORED_LABEL) * label)[:, None]
        return Wanted(of_divergence, labels.clamp(min=0), of_label, self.figures)


def _check(
    hidden: torch.Tensor, reference: torch.Tensor, head_weight: torch.Tensor, mask: torch.Tensor, direction: str
) -> None:
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


def _exact(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


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
        plan: _Plan,
        kl_weight: torch.Tensor,
        cross_entropy_weight: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        size, (loss, *figures) = _run(hidden, reference, head, plan, (kl_weight, cross_entropy_weight), gradient)
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


def summed_divergence(
    hidden: torch.Tensor,
    reference: torch.Tensor,
    head: Head,
    mask: torch.Tensor,
    settings: Settings,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """Sum of the divergence over the tokens in `mask`, and its gradient into `gradient`, which is zero: no autograd."""
    flat = mask.flatten()
    rows = flat.nonzero().squeeze(-1)
    plan = _Plan(rows, flat[rows], None, settings.forward, settings.temperature, figures=False)
    one = torch.ones((), dtype=_exact(hidden), device=hidden.device)
    _, (loss, *_) = _run(hidden, reference, head, plan, (one, one), gradient)
    assert loss is not None  # noqa: S101
    return loss


def _run(
    hidden: torch.Tensor,
    reference: torch.Tensor,
    head: Head,
    plan: _Plan,
    weights: tuple[torch.Tensor, torch.Tensor],
    gradient: torch.Tensor | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """The sums of :func:`_summed`, with the gradient into `gradient`, which is zero, where there is one.

    It is divided by the larger weight, which is returned, so that small weights (one over very many tokens) do not
    underflow in half precision.
    """
    exact = _exact(hidden)
    flat, reference = hidden.flatten(0, -2), reference.to(hidden.device).flatten(0, -2)
    kl_weight, cross_entropy_weight = weights
    size = torch.maximum(kl_weight.abs(), cross_entropy_weight.abs())
    size = torch.where(size > 0, size, torch.ones_like(size))
    given: list[Given] = []
    with torch.autocast(hidden.device.type, enabled=False):
        chunk = Chunk(head, len(plan.rows))
        backend = choose("linear_kl", (flat, reference, head.weight)).module
        passes = backend.Passes(head, Settings(plan.forward, plan.temperature), chunk.tokens, exact)
        for start in range(0, len(plan.rows), chunk.tokens):
            indices = plan.rows[start : start + chunk.tokens]
            chunk.fill(flat[indices].to(exact), reference[indices].to(exact))
            for rows, raw, delta in chunk.blocks(passes.rows):
                part = slice(start + rows.start, start + rows.stop)
                given.append(passes.block(raw, delta, plan.wanted(part, kl_weight / size, cross_entropy_weight / size)))
            if gradient is not None:
                gradient.view(flat.shape).index_copy_(0, indices, chunk.back().to(gradient.dtype))
    return size, _summed(given, plan, kl_weight, cross_entropy_weight)


def _summed(
    given: list[Given], plan: _Plan, kl_weight: torch.Tensor, cross_entropy_weight: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """(loss, Σ KL, Σ NLL, NLL, entropy, hits), the last three by row or None."""

    def joined(name: str) -> torch.Tensor:
        parts = [getattr(block, name) for block in given]
        return torch.cat(parts) if parts else kl_weight.new_zeros(0)

    kl = torch.where(plan.in_mask, joined("divergence"), 0).sum()
    loss = kl_weight * kl
    if plan.labels is None:
        return loss, kl, None, None, None, None
    labelled = plan.labels != IGNORED_LABEL
    nll = torch.where(labelled, joined("nll"), 0)
    cross_entropy = nll.sum()
    loss = loss + cross_entropy_weight * cross_entropy
    if not plan.figures:
        return loss, kl, cross_entropy, None, None, None
    entropy = torch.where(labelled, joined("entropy"), 0)
    return loss, kl, cross_entropy, nll, entropy, labelled & joined("is_top1").to(torch.bool)
