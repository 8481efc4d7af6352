"""Feature distance between the hidden states of two models (LDIFS)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import torch

from safelora_fast.ops.base import Op, differentiable_once, require_tensors
from safelora_fast.ops.feature_distance.torch_impl import Comparison, Normalize, Torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from safelora_fast.ops.base import Example


def feature_distance(
    features: Sequence[torch.Tensor],
    reference_features: Sequence[torch.Tensor],
    mask: torch.Tensor,
    normalize: Normalize = "sequence",
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over layers, mean over sequences, of ‖x − x₀‖² (LDIFS; Kaczér et al., arXiv 2508.06249).

    Computed from ‖h − h₀‖², ⟨h − h₀, h₀⟩ and ‖h₀‖², because 2 − 2⟨x, x₀⟩ cancels.

    On the CPU the sums are float64 and take one read, the gradient takes one more. The bits do not depend on the number
    of threads. On a GPU one Triton launch reads all layers and one writes all gradients, with float32 sums and the same
    bits every run. Other devices and float64 use the same algebra in torch. `SAFELORA_FAST_BACKEND` selects another
    backend (ops/base.py). Differentiable once, and only with respect to `features`. Tokens outside the mask may hold
    any value. `torch.compile(fullgraph=True)` treats it as one operation.

    Args:
        features: per layer, hidden states [batch, tokens, hidden]; float32, bfloat16, float16 or float64.
        reference_features: per layer, hidden states of the reference model, same shapes.
        mask: [batch, tokens] bool, the tokens that count.
        normalize: what is scaled to unit length: "sequence", the tokens × hidden of each sequence; "token", each token;
            "none", nothing.
        segments: [batch, tokens] int, for packed batches: tokens of one batch row with the same number are one
            sequence.
            None: each batch row is one sequence.

    Returns:
        A float32 scalar (float64 for float64 features); zero if no token counts.

    Raises:
        TypeError: an operand is not a tensor.
        ValueError: shapes differ, or `normalize` is unknown.
        BackendError: the backend that `SAFELORA_FAST_BACKEND` names cannot serve these tensors.
        RuntimeError: a second derivative is requested.
    """
    _check(features, reference_features, mask, normalize, segments)
    references = [reference.detach() for reference in reference_features]
    mask = mask.to(torch.bool)
    value: torch.Tensor
    if torch.compiler.is_compiling():
        value, _ = _node(list(features), references, mask, normalize, segments)
        return value
    backend = OP.choose((*features, *references)).backend
    value = _Distance.apply(backend, mask, normalize, segments, *features, *references)
    return value


def _check(
    features: Sequence[torch.Tensor],
    reference_features: Sequence[torch.Tensor],
    mask: torch.Tensor,
    normalize: str,
    segments: torch.Tensor | None,
) -> None:
    require_tensors(mask=mask, **({} if segments is None else {"segments": segments}))
    for name, layers in (("features", features), ("reference_features", reference_features)):
        if isinstance(layers, torch.Tensor):
            raise ValueError(f"{name} is one tensor: it must be a list, one tensor [batch, tokens, hidden] a layer")
        if not isinstance(layers, list | tuple):
            raise TypeError(
                f"{name} is a {type(layers).__name__}: it must be a list, one tensor [batch, tokens, hidden] a layer"
            )
        require_tensors(**{f"{name}[{index}]": layer for index, layer in enumerate(layers)})
    if normalize not in get_args(Normalize):
        raise ValueError(f'normalize is {normalize!r}, it must be "sequence", "token" or "none"')
    if mask.is_floating_point():
        raise ValueError(f"mask is {mask.dtype}: it must say of each token whether it counts, not how much")
    if len(features) != len(reference_features) or not features:
        raise ValueError(f"{len(features)} layers of features and {len(reference_features)} of reference features")
    for layer, reference in zip(features, reference_features, strict=True):
        if not (layer.is_floating_point() and reference.is_floating_point()):
            raise ValueError(f"features are {layer.dtype}, reference features {reference.dtype}: they must be floats")
        if layer.shape != reference.shape or layer.shape[:2] != mask.shape or layer.dim() != 3:
            raise ValueError(
                f"features {tuple(layer.shape)}, reference {tuple(reference.shape)} and mask {tuple(mask.shape)} disagree"
            )
    if segments is not None and segments.shape != mask.shape:
        raise ValueError(f"segments {tuple(segments.shape)} and mask {tuple(mask.shape)} disagree")


class _Distance(torch.autograd.Function):  # type: ignore[misc]
    """Calls a backend without torch's dispatcher, which takes longer than a small distance."""

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
        value: torch.Tensor
        value, factors = backend.forward(Comparison(tensors[:count], tensors[count:], mask, normalize, segments))
        ctx.backend, ctx.normalize = backend, normalize
        ctx.save_for_backward(mask, segments, factors, *tensors)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mask, segments, factors, *tensors = ctx.saved_tensors
        count = len(tensors) // 2
        wanted = [index for index in range(count) if ctx.needs_input_grad[4 + index]]
        comparison = Comparison(tensors[:count], tensors[count:], mask, ctx.normalize, segments)
        if len(wanted) < count:  # indexing with a list would copy it to the device and wait
            comparison, factors = comparison.only(wanted), torch.stack([factors[index] for index in wanted])
        with torch.no_grad():
            gradients = ctx.backend.backward(comparison, factors, gradient)
        features = [tensors[index] for index in wanted]
        tied = differentiable_once(gradients, [*features, gradient], owner="feature_distance")
        result: list[torch.Tensor | None] = [None] * (4 + 2 * count)
        for index, of_layer in zip(wanted, tied, strict=True):
            result[4 + index] = of_layer
        return tuple(result)


# For torch.compile and export: two torch.library operations, each an opaque node in the graph.
_INPUTS = "Tensor[] features, Tensor[] references, Tensor mask, str normalize, Tensor? segments"


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "safelora_fast::feature_distance", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)"
)
def _node(
    features: Sequence[torch.Tensor],
    references: Sequence[torch.Tensor],
    mask: torch.Tensor,
    normalize: Any,
    segments: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    comparison = Comparison(features, references, mask, normalize, segments)
    value, factors = OP.choose((*features, *references)).backend.forward(comparison)
    return value, factors


@_node.register_fake  # type: ignore[untyped-decorator]
def _(features: Any, references: Any, mask: Any, normalize: Any, segments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    comparison = Comparison(features, references, mask, normalize, segments)
    value = torch.empty((), dtype=comparison.value_dtype, device=comparison.device)
    return value, comparison.empty_factors()


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "safelora_fast::feature_distance_gradient",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor factors, Tensor gradient) -> Tensor[]",
)
def _gradient_node(
    features: Sequence[torch.Tensor],
    references: Sequence[torch.Tensor],
    mask: torch.Tensor,
    normalize: Any,
    segments: torch.Tensor | None,
    factors: torch.Tensor,
    gradient: torch.Tensor,
) -> list[torch.Tensor]:
    comparison = Comparison(features, references, mask, normalize, segments)
    found: list[torch.Tensor] = OP.choose((*features, *references)).backend.backward(comparison, factors, gradient)
    return found


@_gradient_node.register_fake  # type: ignore[untyped-decorator]
def _(features: Any, *_: Any) -> list[torch.Tensor]:
    return [torch.empty(layer.shape, dtype=layer.dtype, device=layer.device) for layer in features]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    features, references, mask, normalize, segments = inputs
    ctx.count, ctx.normalize = len(features), normalize
    ctx.save_for_backward(mask, segments, output[1], *features, *references)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, of_value: torch.Tensor, _: Any) -> tuple[Any, ...]:
    mask, segments, factors, *tensors = ctx.saved_tensors
    features, references = tensors[: ctx.count], tensors[ctx.count :]
    gradients = _gradient_node(features, references, mask, ctx.normalize, segments, factors, of_value)
    return gradients, [None] * ctx.count, None, None, None


_node.register_autograd(_differentiate, setup_context=_keep)


def _examples(random: Callable[..., torch.Tensor]) -> Iterator[Example]:
    """Packed batches of odd sizes, with each normalization; some tokens do not count."""
    references = [random(3, 19, 70, seed=layer) for layer in range(2)]
    features = [(layer + random(3, 19, 70, seed=9)).requires_grad_() for layer in references]
    mask = random(3, 19, seed=5) > -0.5
    segments = (torch.arange(19, device=mask.device) // 7).expand(3, 19)
    for normalize in get_args(Normalize):
        yield (
            lambda *states, normalize=normalize: feature_distance(states[:2], states[2:], mask, normalize, segments),
            (*features, *references),
        )


OP = Op("feature_distance", reference=Torch, backends=("native", "triton", "cuda"), examples=_examples)
