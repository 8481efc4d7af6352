"""What a projection does to the modules of a batch whose weights lie on a device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from safelora_fast.errors import AdapterError
from safelora_fast.ops.subspace_projection import subspace_projections
from safelora_fast.ops.subspace_projection.grouped import transposed_products
from safelora_fast.ops.subspace_projection.leading import Extent, Leading, leading_vectors
from safelora_fast.projection.device.damage import damage
from safelora_fast.projection.device.reader import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from safelora_fast.ops.subspace_projection import Projection
    from safelora_fast.projection.device.factors import Factor, FactorReader
    from safelora_fast.projection.device.reader import Pair
    from safelora_fast.projection.settings import Settings


@dataclass(frozen=True)
class DeviceFactorOutcome:
    """One adapter's factors in one module; the figures are those of `_core.FactorOutcome`."""

    cosine: float
    gain: float
    lora_b_norm: float
    lora_b_norm_projected: float
    update_norm: float
    update_norm_projected: float
    left: Factor
    result: torch.Tensor | None

    def projected(self) -> bytes:
        """O·left, (m, r) row-major, in the stored dtype of left.

        Raises:
            AdapterError: a value leaves the range of that dtype.
        """
        if self.result is None:
            raise ValueError("the stream was made with keep_projected=False")
        rounded = self.result.to(DTYPES[self.left.stored_as])
        if not bool(rounded.isfinite().all()):
            row, column = (~rounded.isfinite()).nonzero()[0].tolist()
            path, tensor = self.left.where
            raise AdapterError(
                f'{path}: tensor "{tensor}", once projected, holds {float(self.result[row, column]):.4e} at row {row}, '
                f"column {column}, beyond the range of {self.left.stored_as}; store the adapter in float32"
            )
        return bytes(rounded.contiguous().view(torch.uint8).numpy())


@dataclass(frozen=True)
class DeviceOutcome:
    """One module; the figures are those of `_core.JobOutcome`."""

    index: int
    v_norm: float
    rank: int | None
    energy: float | None
    factors: list[DeviceFactorOutcome]


@dataclass(frozen=True)
class _Module:
    """The factors of one module: B of all adapters side by side on the device, which columns are whose, and A."""

    pair: Pair
    lefts: list[Factor]
    rights: list[Factor]

    def stacked(self) -> torch.Tensor:
        return torch.cat([left.values for left in self.lefts], 1)

    def shares(self) -> Iterator[slice]:
        start = 0
        for left in self.lefts:
            yield slice(start, start + left.values.shape[1])
            start += left.values.shape[1]


class BatchProjector:
    """Projects batch after batch with one operator.

    Args:
        factors: where B and A come from.
        settings: of the projection.
        keep_projected: whether the projected factors are wanted.
    """

    def __init__(self, factors: FactorReader, settings: Settings, *, keep_projected: bool) -> None:
        self._factors, self._keep = factors, keep_projected
        self._extent: Extent | None = None
        self._variant = settings.described_operator.variant
        if self._variant == "orthogonal":
            self._extent = Extent(settings.rank, settings.energy)
        elif self._variant == "spectral":
            self._extent = Extent(rank=1)

    def run(self, batch: Sequence[Pair]) -> list[DeviceOutcome]:
        """The outcomes of a batch, in its order; they hold nothing of the device.

        Raises:
            CheckpointError: a weight or factor is NaN or infinite, or products leave the range of float32.
        """
        modules = [
            _Module(pair, [self._factors.left(met) for met in met_by], [self._factors.right(met) for met in met_by])
            for pair, met_by in ((pair, pair.wanted.planned.group.factors) for pair in batch)
        ]
        pairs, stacked = [(pair.aligned, pair.base) for pair in batch], [module.stacked() for module in modules]
        projections = subspace_projections(pairs, stacked)
        norms = [float(projection.v_norm) for projection in projections]
        for module, projection, norm in zip(modules, projections, norms, strict=True):
            if not (math.isfinite(norm) and bool(projection.product_gram.diagonal().sum().isfinite())):
                raise damage(module.pair)
        leading = [
            leading_vectors(pair, self._extent) if self._extent is not None and norm > 0 else None
            for pair, norm in zip(pairs, norms, strict=True)
        ]
        operated = self._operated(projections, leading, stacked)
        flipped = [right.values.mT for module in modules for right in module.rights]
        right_grams = iter(transposed_products(flipped, flipped)[0])
        outcomes = []
        for index, module in enumerate(modules):
            norm, found = norms[index], leading[index]
            grams = [next(right_grams).double().cpu() for _ in module.rights]
            factor = self._factor(norm, found)
            is_orthogonal = self._variant == "orthogonal"
            outcomes.append(
                DeviceOutcome(
                    module.pair.wanted.index,
                    norm,
                    (0 if found is None else len(found.values)) if is_orthogonal else None,
                    min(float(found.values.square().sum()) / norm**2, 1.0) if is_orthogonal and found else None,
                    self._figures(module, projections[index], operated[index], grams, factor),
                )
            )
        return outcomes

    def _operated(
        self, projections: list[Projection], leading: Sequence[Leading | None], stacked: Sequence[torch.Tensor]
    ) -> list[Projection]:
        """O·B up to a factor: C·B, or U_k·U_kᵀ·B."""
        if self._variant != "orthogonal":
            return projections
        wanted = [index for index, found in enumerate(leading) if found is not None]
        bases = [found.vectors for found in leading if found is not None]
        operated = list(projections)
        if wanted:
            for index, found in zip(wanted, subspace_projections(bases, [stacked[at] for at in wanted]), strict=True):
                operated[index] = found
        return operated

    def _factor(self, norm: float, leading: Leading | None) -> float:
        """What :meth:`_operated` is to be multiplied by; where V is zero every operator leaves B as it is."""
        if norm == 0:
            return 1.0
        if self._variant == "zero":
            return 0.0
        if self._variant == "spectral":
            assert leading is not None  # noqa: S101
            return norm / float(leading.values[0]) ** 2
        return 1.0

    def _figures(
        self, module: _Module, paper: Projection, operated: Projection, rights: Sequence[torch.Tensor], factor: float
    ) -> list[DeviceFactorOutcome]:
        """Figures of every adapter from r×r Grams, in float64 (docs/methods.md).

        Args:
            module: its factors.
            paper: C·B.
            operated: O·B up to `factor`.
            rights: A·Aᵀ of every adapter.
            factor: the rest of O.
        """
        plain, cross, product, after = (
            gram.double().cpu() for gram in (paper.gram, paper.cross_gram, paper.product_gram, operated.product_gram)
        )
        result = (operated.product.double() * factor).cpu() if self._keep else None
        is_zero = not float(paper.v_norm) > 0
        outcomes = []
        for share, left, right, gram in zip(module.shares(), module.lefts, module.rights, rights, strict=True):
            update, inner, update_after, update_operated = (
                max(float((matrix[share, share] * gram).sum()), 0.0) for matrix in (plain, cross, product, after)
            )
            lora_b_norm = left.scale * float(plain[share, share].trace()) ** 0.5
            left_after = factor * left.scale * float(after[share, share].trace()) ** 0.5
            both = left.scale * right.scale
            norms = (update * update_after) ** 0.5
            outcomes.append(
                DeviceFactorOutcome(
                    cosine=math.nan if is_zero or norms == 0 else min(inner / norms, 1.0),
                    gain=left_after / lora_b_norm if update > 0 else math.nan,
                    lora_b_norm=lora_b_norm,
                    lora_b_norm_projected=left_after,
                    update_norm=both * update**0.5,
                    update_norm_projected=factor * both * update_operated**0.5,
                    left=left._replace(values=torch.empty(0)),
                    result=None if result is None else result[:, share] * left.scale,
                )
            )
        return outcomes
