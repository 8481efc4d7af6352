"""The form in which backends take their arguments, and the feature distance by torch, one batch row at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from safelora_fast.ops.base import DTYPE_NAMES, Backend

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

Normalize = Literal["sequence", "token", "none"]
# Address, dtype, shape and strides of hidden states.
View: TypeAlias = "tuple[int, str, tuple[int, int, int], tuple[int, int]]"


@dataclass(frozen=True)
class Comparison:
    """The checked arguments: hidden states of two models, layer by layer. Every backend takes them in this form.

    A backend has two methods:

        forward(comparison) -> (value, factors)
        backward(comparison, factors, gradient) -> one gradient per layer, like its features

    The value is a scalar of `value_dtype` on the first layer's device. The factors are made by `empty_factors`. For
    each token they hold (a, b): its gradient is a·(h − h₀) − b·h, times the scalar `gradient`. A token that does not
    count has factors (0, 0) and a zero gradient, whatever values it holds.

    Attributes:
        features: per layer [batch, tokens, hidden].
        references: per layer the same shape, without gradient; dtype and device may differ.
        mask: [batch, tokens] bool, on any device.
        normalize: what is scaled to unit length.
        segments: [batch, tokens] integers or None, on any device.
    """

    features: Sequence[torch.Tensor]
    references: Sequence[torch.Tensor]
    mask: torch.Tensor
    normalize: Normalize
    segments: torch.Tensor | None

    def only(self, layers: Sequence[int]) -> Comparison:
        """Return a comparison of these layers alone, with everything on their device."""
        device = self.features[layers[0]].device if layers else self.device
        return Comparison(
            [self.features[index].detach() for index in layers],
            [self.references[index].detach().to(device) for index in layers],
            self.mask.to(device),
            self.normalize,
            None if self.segments is None else self.segments.to(device),
        )

    def groups(self, key: Callable[[torch.Tensor, torch.Tensor], Hashable]) -> list[list[int]]:
        """Group layer indices by `key(features, reference)`, in the order of the first layer of each group."""
        found: dict[Hashable, list[int]] = {}
        for index, pair in enumerate(zip(self.features, self.references, strict=True)):
            found.setdefault(key(*pair), []).append(index)
        return list(found.values())

    @property
    def device(self) -> torch.device:
        """Device of the value and the factors."""
        return self.features[0].device

    @property
    def value_dtype(self) -> torch.dtype:
        """float32, or float64 for float64 features."""
        wide = any(layer.dtype == torch.float64 for layer in self.features)
        return torch.float64 if wide else torch.float32

    def empty_factors(self) -> torch.Tensor:
        """Uninitialized factors [layers, batch, tokens, 2]; float64 on the CPU, elsewhere the dtype of the value."""
        dtype = torch.float64 if self.device.type == "cpu" else self.value_dtype
        return torch.empty((len(self.features), *self.mask.shape, 2), dtype=dtype, device=self.device)

    def for_extension(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Features and references as the extension module reads them: one dtype per layer, contiguous hidden axis."""
        features, references = [], []
        for layer, given in zip(self.features, self.references, strict=True):
            reference = given.to(layer.device)
            alike = layer.dtype == reference.dtype
            features.append(_contiguous(layer if alike else layer.float()))
            references.append(_contiguous(reference if alike else reference.float()))
        return features, references


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(2) == 1 or tensor.shape[2] == 1 else tensor.contiguous()


def view_of(tensor: torch.Tensor) -> View:
    """Hidden states as the extension module takes them."""
    return tensor.data_ptr(), DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.stride()[:2]


class Torch(Backend):
    """Computes in `dtype`; by default in float32, and in float64 for float64 features."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype

    def forward(self, comparison: Comparison) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the distance and the factors."""
        groups, sequences = _groups(comparison.mask, comparison.segments)
        value = torch.zeros((), dtype=self._dtype or comparison.value_dtype, device=comparison.device)
        factors = comparison.empty_factors()
        for index, (layer, reference) in enumerate(zip(comparison.features, comparison.references, strict=True)):
            distance, of_difference, of_features = _of_layer(
                layer.detach(),
                reference.to(layer.device),
                groups.to(layer.device),
                sequences,
                comparison.normalize,
                self._exact(layer),
            )
            value = value + distance.to(value)
            factors[index] = torch.stack([of_difference, of_features], -1).to(factors)
        count = max(sequences, 1)
        return (value / count).to(comparison.value_dtype), factors.div_(count)

    def backward(self, comparison: Comparison, factors: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
        """Return the gradients of all layers, in their dtypes."""
        return [
            _gradient(layer, reference.to(layer.device), part.to(layer.device), gradient.to(layer.device), self._exact(layer))
            for layer, reference, part in zip(comparison.features, comparison.references, factors, strict=True)
        ]  # fmt: skip

    def _exact(self, layer: torch.Tensor) -> torch.dtype:
        return self._dtype or (torch.float64 if layer.dtype == torch.float64 else torch.float32)


def _groups(mask: torch.Tensor, segments: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """Index of each token's sequence, and number of sequences; tokens that do not count have that number as index."""
    rows = torch.arange(mask.shape[0], device=mask.device)[:, None].expand(mask.shape)
    if segments is not None and segments.numel():
        low = segments.min()
        rows = rows * (segments.max() - low + 1) + (segments - low)
    numbers, inverse = rows[mask].unique(return_inverse=True)
    groups = torch.full(mask.shape, len(numbers), dtype=torch.long, device=mask.device)
    groups[mask] = inverse
    return groups, len(numbers)


def _of_layer(
    layer: torch.Tensor,
    reference: torch.Tensor,
    groups: torch.Tensor,
    sequences: int,
    normalize: str,
    exact: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer's distance, summed over sequences, and the factors of d and h in its gradient, [batch, tokens] each."""
    sums = torch.empty((layer.shape[0], 3, layer.shape[1]), dtype=exact, device=layer.device)
    for row in range(layer.shape[0]):
        sums[row] = _row_sums(layer[row].to(exact), reference[row].to(exact))
    squared, dot, norm = sums.unbind(1)  # [batch, tokens]: ‖d‖², ⟨d, h₀⟩, ‖h₀‖²
    if normalize == "sequence":
        squared, dot, norm = (_summed(values, groups, sequences) for values in (squared, dot, norm))
    if normalize == "none":
        distance, of_difference, of_features = squared, torch.full_like(squared, 2.0), torch.zeros_like(squared)
    else:
        distance, of_difference, of_features = _unit_distance(squared, dot, norm)
    counted = groups < sequences
    zero = torch.zeros((), dtype=exact, device=layer.device)
    if normalize == "sequence":
        total, of_difference, of_features = distance[:-1].sum(), of_difference[groups], of_features[groups]
    else:
        total = torch.where(counted, distance, zero).sum()
    return total, torch.where(counted, of_difference, zero), torch.where(counted, of_features, zero)


def _gradient(
    layer: torch.Tensor, reference: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor, exact: torch.dtype
) -> torch.Tensor:
    gradient = torch.empty_like(layer, memory_format=torch.contiguous_format)
    scaled = (factors * weight).to(exact)
    for row in range(layer.shape[0]):
        of_difference, of_features = scaled[row, :, :1], scaled[row, :, 1:]
        h = layer[row].to(exact)
        difference = (h - reference[row].to(exact)).mul_(of_difference)
        difference.addcmul_(h, of_features, value=-1.0)
        gradient[row] = difference.masked_fill_(factors[row, :, :1] == 0, 0.0)
    return gradient


def _row_sums(h: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """[3, tokens]: ‖d‖², ⟨d, h₀⟩ and ‖h₀‖² with d = h − h₀."""
    difference = h - reference
    return torch.stack(
        [(difference * difference).sum(-1), (difference * reference).sum(-1), (reference * reference).sum(-1)]
    )


def _summed(values: torch.Tensor, groups: torch.Tensor, sequences: int) -> torch.Tensor:
    """Sums over the tokens of each sequence; the last entry collects the tokens that do not count."""
    result = torch.zeros(sequences + 1, dtype=values.dtype, device=values.device)
    return result.index_add_(0, groups.flatten(), values.flatten())


def _unit_distance(
    squared: torch.Tensor, dot: torch.Tensor, norm: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distance between unit vectors, and the factors of d and h in its gradient.

    With p = ‖h‖ and q = ‖h₀‖: (‖d‖² − (p − q)²)/(pq), gradient 2/(pq)·(d − ((⟨d, h₀⟩ + ‖d‖²)/p²)·h). A zero vector has
    no direction: its unit vector is taken as zero, and so is its gradient.
    """
    q = norm.sqrt()
    p_squared = (norm + 2 * dot + squared).clamp(min=0)
    p = p_squared.sqrt()
    known = (p != 0) & ((q != 0) | p.isnan())  # keeps NaN visible
    product = torch.where(known, p * q, torch.ones_like(q))
    gap = torch.where(known, (2 * dot + squared) / torch.where(known, p + q, product), torch.zeros_like(q))
    unknown = (p != q).to(q.dtype)
    distance = torch.where(known, (squared - gap * gap) / product, unknown)
    of_difference = torch.where(known, 2 / product, torch.zeros_like(q))
    share = (dot + squared) / torch.where(known, p_squared, torch.ones_like(q))
    return distance, of_difference, of_difference * share
