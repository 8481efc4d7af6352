"""KL divergence between two models that share an output head, from hidden states, with optional cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch

from safelora_fast.ops.base import Op, differentiable_once, require_tensors
from safelora_fast.ops.linear_kl.chunks import Head, Rows, Settings, exact_dtype, weighted_sums
from safelora_fast.ops.linear_kl.torch_impl import Torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from safelora_fast.ops.base import Example

__all__ = ["OP", "Head", "SharedLoss", "TokenFigures", "linear_kl", "linear_kl_cross_entropy"]

Direction = Literal["reverse", "forward"]


@dataclass(frozen=True)
class TokenFigures:
    """Metrics of each label under the student, [batch, tokens] each, without gradient; zero where there is no label.

    Attributes:
        nll: negative log-likelihood.
        entropy: entropy of the next-token distribution.
        is_top1: whether the label is the top prediction; of tied classes the first wins.
    """

    nll: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


@dataclass(frozen=True)
class SharedLoss:
    """KL and cross-entropy from the same logits.

    Attributes:
        loss: kl_weight · kl + cross_entropy_weight · cross_entropy, differentiable; float32, or float64 for float64
            states.
        kl: sum of the divergence over the tokens in the mask, with their weights, without gradient.
        cross_entropy: sum of the negative log-likelihood of the labels, without gradient.
        tokens: metrics per token, if requested with `figures`.
    """

    loss: torch.Tensor
    kl: torch.Tensor
    cross_entropy: torch.Tensor
    tokens: TokenFigures | None


def linear_kl(
    hidden: torch.Tensor,
    reference_hidden: torch.Tensor,
    head_weight: torch.Tensor,
    mask: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    direction: Direction = "reverse",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Mean over tokens of the KL divergence between the next-token distributions of two hidden states.

    Logits are softcap(logit_scale · (h·Wᵀ + bias))/temperature. They are computed one chunk of tokens at a time, for
    the reference and for the difference W(h − h₀), so nothing cancels while both are close. The gradient with respect
    to `hidden` is computed in the same pass, and only it is kept. W, the bias and the reference get no gradient.

    Args:
        hidden: [batch, tokens, hidden] of the student; float32, bfloat16, float16 or float64.
        reference_hidden: the same of the reference model.
        head_weight: W [vocabulary, hidden], shared; used in the dtype of `hidden`, or the autocast dtype if autocast is
            on, as in a linear layer. Everything else is float32 (float64 for float64 states).
        mask: [batch, tokens] bool, the tokens that count.
        weights: [batch, tokens] floats, factors of the tokens' divergence; the mean still divides by the number of tokens.
        bias: [vocabulary].
        direction: "reverse" is KL(student ‖ reference), "forward" is KL(reference ‖ student).
        temperature: divides the logits.
        logit_scale: multiplies the logits before the soft-cap.
        softcap: c of c·tanh(logits/c).

    Returns:
        A float32 scalar (float64 for float64 states); zero if no token counts.

    Raises:
        ValueError: shapes or dtypes do not fit, `direction` is unknown, temperature or soft-cap is not positive.
        RuntimeError: a second derivative is requested.
    """
    _check(hidden, reference_hidden, head_weight, mask, direction)
    _check_head(head_weight, bias, temperature, softcap)
    head, weights = _head(hidden, head_weight, bias, logit_scale, softcap), _flat_weights(weights, mask, hidden)
    mask = mask.to(hidden.device, torch.bool).flatten()
    settings = Settings(direction == "forward", temperature)
    call = _Call(hidden, reference_hidden.detach(), head, mask, weights, None, settings, False)
    one = torch.ones((), dtype=exact_dtype(hidden), device=hidden.device)
    loss, count = _losses(call, one, one)
    return loss.loss / (mask.sum().clamp(min=1) if count is None else max(count, 1))


def linear_kl_cross_entropy(
    hidden: torch.Tensor,
    reference_hidden: torch.Tensor,
    head_weight: torch.Tensor,
    mask: torch.Tensor,
    labels: torch.Tensor,
    *,
    kl_weight: torch.Tensor | float,
    cross_entropy_weight: torch.Tensor | float,
    weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    direction: Direction = "reverse",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    figures: bool = False,
) -> SharedLoss:
    """Compute the divergence of :func:`linear_kl` and the task's cross-entropy from one set of student logits.

    The weights are the factors of the two sums in the loss (λ / number of tokens, 1 / number of labels). Since the
    forward knows them, one product with W gives the gradient of both, stored in one [batch, tokens, hidden] tensor.
    Separate losses would take two products and two tensors.

    Args:
        hidden: as in :func:`linear_kl`.
        reference_hidden: as in :func:`linear_kl`.
        head_weight: as in :func:`linear_kl`.
        mask: [batch, tokens] bool, the tokens whose divergence counts.
        labels: [batch, tokens], the next token at each position; -100 for none.
        kl_weight: factor of the sum of the divergence, a number or a scalar tensor.
        cross_entropy_weight: factor of the sum of the negative log-likelihood, a number or a scalar tensor.
        weights: [batch, tokens] floats, factors of the tokens' divergence.
        bias: [vocabulary].
        direction: as in :func:`linear_kl`.
        temperature: divides the logits of the divergence; the cross-entropy has none.
        logit_scale: multiplies the logits before the soft-cap.
        softcap: c of c·tanh(logits/c).
        figures: also return `tokens`; this takes two more passes over the logits.

    Raises:
        ValueError: as in :func:`linear_kl`.
        RuntimeError: a second derivative is requested.
    """
    _check(hidden, reference_hidden, head_weight, mask, direction)
    _check_head(head_weight, bias, temperature, softcap)
    if labels.shape != mask.shape:
        raise ValueError(f"labels {tuple(labels.shape)} and mask {tuple(mask.shape)} disagree")
    head, weights = _head(hidden, head_weight, bias, logit_scale, softcap), _flat_weights(weights, mask, hidden)
    mask, labels = mask.to(hidden.device, torch.bool).flatten(), labels.to(hidden.device).flatten()
    settings = Settings(direction == "forward", temperature)
    call = _Call(hidden, reference_hidden.detach(), head, mask, weights, labels, settings, figures)
    return _losses(call, _scalar(kl_weight, hidden), _scalar(cross_entropy_weight, hidden))[0]


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


def _head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float | None
) -> Head:
    kind, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    weight = weight.detach().to(hidden.device, dtype)
    return Head(weight, None if bias is None else bias.detach(), scale, softcap)


def _flat_weights(weights: torch.Tensor | None, mask: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor | None:
    if weights is None:
        return None
    if weights.shape != mask.shape:
        raise ValueError(f"weights {tuple(weights.shape)} and mask {tuple(mask.shape)} disagree")
    return weights.detach().to(hidden.device, exact_dtype(hidden)).flatten()


def _scalar(value: torch.Tensor | float, hidden: torch.Tensor) -> torch.Tensor:
    """Return a weight as a scalar on the device. A number is filled in there; copying it would wait for the device."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(hidden.device, exact_dtype(hidden))
    return torch.full((), value, dtype=exact_dtype(hidden), device=hidden.device)


class _Call(NamedTuple):
    """The checked arguments; mask, weights and labels are flat."""

    hidden: torch.Tensor
    reference: torch.Tensor
    head: Head
    mask: torch.Tensor
    weights: torch.Tensor | None
    labels: torch.Tensor | None
    settings: Settings
    figures: bool


def _losses(call: _Call, kl_weight: torch.Tensor, cross_entropy_weight: torch.Tensor) -> tuple[SharedLoss, int | None]:
    """Both losses, differentiable once in `hidden`, and the number of computed tokens if the host knows it."""
    hidden, reference, head, mask, weights, labels, settings, figures = call
    if torch.compiler.is_compiling():
        is_differentiable = hidden.requires_grad and torch.is_grad_enabled()
        loss, kl, cross_entropy, *per_token, _, _ = _node(
            hidden, reference, head.weight, head.bias, mask, labels, kl_weight, cross_entropy_weight, weights, *settings,
            head.scale, head.softcap, figures, is_differentiable,
        )  # fmt: skip
        return SharedLoss(loss, kl, cross_entropy, TokenFigures(*per_token) if figures else None), None
    rows = Rows.of(mask, labels, settings, figures=figures, weights=weights)
    anchor = hidden.narrow(0, 0, 0).clone()  # connects the gradient to `hidden` without keeping it in memory
    loss, kl, cross_entropy, *per_row = _LinearLoss.apply(
        hidden, anchor, reference, head, rows, kl_weight, cross_entropy_weight
    )
    tokens = TokenFigures(*_per_token(rows, per_row, hidden.shape[:-1])) if figures else None
    return SharedLoss(loss, kl, cross_entropy, tokens), None if rows.positions is None else len(rows)


def _per_token(rows: Rows, per_row: Sequence[torch.Tensor], shape: Sequence[int]) -> list[torch.Tensor]:
    """Scatter per-row metrics to [batch, tokens], with zeros elsewhere."""
    whole = [torch.zeros(rows.counts.shape, dtype=row.dtype, device=row.device) for row in per_row]
    for flat, row in zip(whole, per_row, strict=True):
        rows.put(flat, slice(None), row)
    return [flat.view(shape) for flat in whole]


class _LinearLoss(torch.autograd.Function):  # type: ignore[misc]
    """Weighted sum of both losses. The forward computes the gradient too, because it has the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        anchor: torch.Tensor,
        reference: torch.Tensor,
        head: Head,
        rows: Rows,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        backend = _backend(hidden, reference, head)
        gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        both = cast("tuple[torch.Tensor, torch.Tensor]", weights)
        size, (loss, *figures) = weighted_sums(backend, hidden, reference, head, rows, both, gradient)
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


def _backend(hidden: torch.Tensor, reference: torch.Tensor, head: Head) -> Any:
    return OP.choose((hidden, reference, head.weight)).backend


# For torch.compile and export: a torch.library operation. Compiled code cannot trace it, because which tokens count is
# known only at run time.
@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "safelora_fast::linear_kl",
    mutates_args=(),
    schema="(Tensor hidden, Tensor reference, Tensor weight, Tensor? bias, Tensor mask, Tensor? labels, Tensor kl_weight, "
    "Tensor cross_entropy_weight, Tensor? weights, bool forward, float temperature, float scale, float? softcap, bool figures, "
    f"bool differentiable) -> ({', '.join(['Tensor'] * 8)})",
)
def _node(
    hidden: torch.Tensor,
    reference: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor,
    labels: torch.Tensor | None,
    kl_weight: torch.Tensor,
    cross_entropy_weight: torch.Tensor,
    weights: torch.Tensor | None,
    forward: bool,
    temperature: float,
    scale: float,
    softcap: float | None,
    figures: bool,
    differentiable: bool,
) -> tuple[torch.Tensor, ...]:
    """Loss, Σ KL, Σ NLL, three metrics per token, the gradient divided by a scale, and that scale."""
    head, rows = (
        Head(weight, bias, scale, softcap),
        Rows.of(mask, labels, Settings(forward, temperature), figures=figures, weights=weights),
    )
    gradient = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if differentiable else None
    size, (loss, kl, cross_entropy, *per_row) = weighted_sums(
        _backend(hidden, reference, head), hidden, reference, head, rows, (kl_weight, cross_entropy_weight), gradient
    )
    assert loss is not None  # noqa: S101
    assert kl is not None  # noqa: S101
    none = torch.zeros_like(loss) if cross_entropy is None else cross_entropy
    per_token = (
        _per_token(rows, cast("list[torch.Tensor]", per_row), hidden.shape[:-1]) if figures else _nothing(hidden, 0)
    )
    return loss, kl, none, *per_token, hidden.new_empty(0) if gradient is None else gradient, size


@_node.register_fake  # type: ignore[untyped-decorator]
def _(hidden: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
    figures, differentiable = rest[-2:]
    sums = [torch.empty((), dtype=exact_dtype(hidden), device=hidden.device) for _ in range(4)]
    per_token = _nothing(hidden, *(hidden.shape[:-1] if figures else [0]))
    return *sums[:3], *per_token, hidden.new_empty(hidden.shape if differentiable else 0), sums[3]


def _nothing(hidden: torch.Tensor, *shape: int) -> list[torch.Tensor]:
    dtypes = exact_dtype(hidden), exact_dtype(hidden), torch.bool
    return [torch.empty(shape, dtype=dtype, device=hidden.device) for dtype in dtypes]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(*output[-2:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, of_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    gradient, size = ctx.saved_tensors
    return ((gradient * (of_loss * size)).to(gradient.dtype), *[None] * 14)


_node.register_autograd(_differentiate, setup_context=_keep)


def _examples(random: Callable[..., torch.Tensor]) -> Iterator[Example]:
    """Both losses in both directions, with labels inside and outside the mask; then the KL alone with a soft-cap."""
    reference, head, mask = random(2, 5, 8), random(333, 8, seed=1), random(2, 5, seed=5) > -1
    hidden = (reference + 0.3 * random(2, 5, 8, seed=2)).requires_grad_()
    labels = torch.arange(10, device=mask.device).view(2, 5)
    labels[0, 2:] = -100
    weights = 1 + 3 * (labels % 3)
    for direction in ("reverse", "forward"):

        def losses(
            hidden: torch.Tensor, reference: torch.Tensor, head: torch.Tensor, direction: Any = direction
        ) -> list[torch.Tensor]:
            found = linear_kl_cross_entropy(
                hidden, reference, head, mask, labels, kl_weight=0.3, cross_entropy_weight=0.07, direction=direction,
                figures=True, weights=weights,
            )  # fmt: skip
            assert found.tokens is not None  # noqa: S101
            return [found.loss, found.kl, found.cross_entropy, found.tokens.nll, found.tokens.entropy]

        yield losses, (hidden, reference, head)
    settings: dict[str, Any] = {"bias": random(333, seed=3), "softcap": 3.0, "logit_scale": 0.7, "temperature": 1.5}
    yield lambda h, h0, weight: linear_kl(h, h0, weight, mask, **settings), (hidden, reference, head)


OP = Op("linear_kl", reference=Torch, backends=("triton",), examples=_examples)
