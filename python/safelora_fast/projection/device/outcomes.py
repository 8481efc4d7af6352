"""The projection of a batch of modules whose weights are on a device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from safelora_fast.errors import AdapterError
from safelora_fast.ops.subspace_projection import subspace_projections, transposed_products
from safelora_fast.projection.device.factors import damage
from safelora_fast.projection.device.leading_vectors import Extent, Leading, leading_vectors
from safelora_fast.projection.device.reader import DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.ops.subspace_projection import Projection
    from safelora_fast.projection.device.factors import Factor, FactorReader
    from safelora_fast.projection.device.reader import Pair
    from safelora_fast.projection.settings import Settings


WITH_VECTORS = {"orthogonal", "attenuate"}  # operator variants that use leading singular vectors of V


@dataclass(frozen=True)
class DeviceFactorOutcome:
    """One adapter's outcome in one module, with the metrics of `_core.FactorOutcome`."""

    cosine: float
    gain: float
    lora_b_norm: float
    lora_b_norm_projected: float
    update_norm: float
    update_norm_projected: float
    lora_b: Factor
    lora_a: Factor
    result: torch.Tensor | None
    result_a: torch.Tensor | None

    def projected(self) -> bytes:
        """Return O·B, (m, r) row-major, in the stored dtype of B.

        Raises:
            AdapterError: a value exceeds the range of that dtype.
        """
        if self.result is None:
            raise ValueError("the stream was made with keep_projected=False")
        return _stored(self.result, self.lora_b)

    def projected_lora_a(self) -> bytes | None:
        """Return the projected A, (r, n) row-major, in its stored dtype; None if A is unchanged.

        Raises:
            AdapterError: a value exceeds the range of that dtype.
        """
        return None if self.result_a is None else _stored(self.result_a, self.lora_a)


def _stored(result: torch.Tensor, factor: Factor) -> bytes:
    """Convert a projected factor to its stored dtype."""
    rounded = result.to(DTYPES[factor.stored_as])
    if not bool(rounded.isfinite().all()):
        row, column = (~rounded.isfinite()).nonzero()[0].tolist()
        path, tensor = factor.where
        raise AdapterError(
            f'{path}: tensor "{tensor}", once projected, holds {float(result[row, column]):.4e} at row {row}, '
            f"column {column}, beyond the range of {factor.stored_as}; store the adapter in float32"
        )
    return bytes(rounded.contiguous().view(torch.uint8).numpy())


@dataclass(frozen=True)
class DeviceOutcome:
    """One module's outcome, with the metrics of `_core.JobOutcome`."""

    index: int
    v_norm: float
    rank: int | None
    energy: float | None
    factors: list[DeviceFactorOutcome]


class BatchProjector:
    """Projects batches of modules with one operator.

    Args:
        factors: the reader of B and A.
        settings: the settings of the projection.
        keep_projected: whether to keep the projected factors.
    """

    def __init__(self, factors: FactorReader, settings: Settings, *, keep_projected: bool) -> None:
        self._factors, self._keep = factors, keep_projected
        self._variant, self._sides = settings.described_operator.variant, settings.sides
        self._stays = settings.keep or 0.0
        self._extent: Extent | None = None
        if self._variant in WITH_VECTORS:
            self._extent = Extent(settings.rank, settings.energy)
        elif self._variant == "spectral":
            self._extent = Extent(rank=1)

    def run(self, batch: Sequence[Pair]) -> list[DeviceOutcome]:
        """Return the outcomes of a batch, in its order; they hold no device memory.

        Raises:
            CheckpointError: a weight or factor is NaN or infinite, or products exceed the range of float32.
        """
        met = [pair.wanted.planned.group.factors for pair in batch]
        lora_b = [[self._factors.read(each.adapter, each.lora_b) for each in factors] for factors in met]
        lora_a = [[self._factors.read(each.adapter, each.lora_a) for each in factors] for factors in met]
        pairs = [(pair.aligned, pair.base) for pair in batch]
        # The B of all adapters are concatenated, so that V is read only once.
        stacked = [torch.cat([factor.values for factor in factors], 1) for factors in lora_b]
        papers = subspace_projections(pairs, stacked)
        norms = [float(paper.v_norm) for paper in papers]
        for pair, paper, norm in zip(batch, papers, norms, strict=True):
            if not (math.isfinite(norm) and bool(paper.product_gram.diagonal().sum().isfinite())):
                raise damage(pair)
        leading = [
            leading_vectors(pair, self._extent) if self._extent is not None and norm > 0 else None
            for pair, norm in zip(pairs, norms, strict=True)
        ]
        operated = self._operated(papers, leading, stacked)
        right = self._right_vectors(pairs, leading)
        flipped = [factor.values.mT for factors in lora_a for factor in factors]
        grams = iter(transposed_products(flipped, flipped)[0])
        outcomes = []
        for index, pair in enumerate(batch):
            norm, found = norms[index], leading[index]
            with_vectors = self._variant in WITH_VECTORS
            share = None if found is None else min(float(found.values.square().sum()) / norm**2, 1.0)
            outcomes.append(
                DeviceOutcome(
                    pair.wanted.index,
                    norm,
                    (0 if found is None else len(found.values)) if with_vectors else None,
                    share if with_vectors else None,
                    self._metrics(
                        papers[index],
                        operated[index],
                        self._factor(norm, found),
                        right[index],
                        [(b, a, next(grams)) for b, a in zip(lora_b[index], lora_a[index], strict=True)],
                    ),
                )
            )
        return outcomes

    def _operated(
        self, papers: list[Projection], leading: Sequence[Leading | None], stacked: Sequence[torch.Tensor]
    ) -> list[Projection]:
        """Return O·B up to a scalar factor: C·B, or U_k·U_kᵀ·B plus a share of the rest."""
        wanted = [index for index, found in enumerate(leading) if found is not None]
        if self._variant not in WITH_VECTORS or not wanted:
            return papers
        bases = [found.vectors for found in leading if found is not None]
        projected = subspace_projections(bases, [stacked[index] for index in wanted])
        found = {index: self._with_rest(one, stacked[index]) for index, one in zip(wanted, projected, strict=True)}
        return [found.get(index, paper) for index, paper in enumerate(papers)]

    def _with_rest(self, inside: Projection, whole: torch.Tensor) -> Projection:
        if not self._stays:
            return inside
        product = self._stays * whole.double() + (1 - self._stays) * inside.product.double()
        return replace(inside, product=product, product_gram=product.mT @ product)

    def _right_vectors(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], leading: Sequence[Leading | None]
    ) -> list[torch.Tensor | None]:
        """Return W_k = VᵀU_k/σ [n, k] of each module, float64, if the operator changes A."""
        if self._variant != "attenuate" or self._sides == "left":
            return [None] * len(pairs)
        right: list[torch.Tensor | None] = []
        for pair, found in zip(pairs, leading, strict=True):
            if found is None:
                right.append(None)
                continue
            ((images,), _) = transposed_products([pair], [found.vectors])
            right.append(torch.linalg.qr(images.double() / found.values.to(images.device))[0])
        return right

    def _factor(self, norm: float, leading: Leading | None) -> float:
        """Return the scalar factor of O that `_operated` leaves out. If V is zero, all operators leave B unchanged."""
        if norm > 0 and self._variant == "zero":
            return 0.0
        if self._variant == "spectral" and leading is not None:
            return norm / float(leading.values[0]) ** 2
        return 1.0

    def _metrics(
        self,
        paper: Projection,
        operated: Projection,
        factor: float,
        right: torch.Tensor | None,
        adapters: Sequence[tuple[Factor, Factor, torch.Tensor]],
    ) -> list[DeviceFactorOutcome]:
        """Compute the metrics of each adapter from r×r Gram matrices, in float64 (docs/methods.md).

        Args:
            paper: C·B.
            operated: O·B up to `factor`.
            factor: the remaining scalar factor of O.
            right: W_k, if A changes.
            adapters: B, A and A·Aᵀ of each adapter.
        """
        plain, cross, product, after = (
            gram.double().cpu() for gram in (paper.gram, paper.cross_gram, paper.product_gram, operated.product_gram)
        )
        result = (operated.product.double() * factor).cpu() if self._keep else None
        outcomes, end = [], 0
        for lora_b, lora_a, a_gram in adapters:
            share = slice(end, end := end + lora_b.values.shape[1])
            gram = a_gram.double().cpu()
            result_a, gram_after = None, gram
            if right is not None:
                a = lora_a.values.double()
                a = self._stays * a + (1 - self._stays) * (a @ right) @ right.mT
                gram_after = (a @ a.mT).cpu()
                result_a = (a * lora_a.scale).cpu() if self._keep else None
            update, inner, update_after = (
                max(float((matrix[share, share] * gram).sum()), 0.0) for matrix in (plain, cross, product)
            )
            update_operated = max(float((after[share, share] * gram_after).sum()), 0.0)
            norm = lora_b.scale * float(plain[share, share].trace()) ** 0.5
            norm_after = factor * lora_b.scale * float(after[share, share].trace()) ** 0.5
            scale, norms = lora_b.scale * lora_a.scale, (update * update_after) ** 0.5
            has_cosine = float(paper.v_norm) > 0 and norms > 0
            outcomes.append(
                DeviceFactorOutcome(
                    cosine=min(inner / norms, 1.0) if has_cosine else math.nan,
                    gain=norm_after / norm if update > 0 else math.nan,
                    lora_b_norm=norm,
                    lora_b_norm_projected=norm_after,
                    update_norm=scale * update**0.5,
                    update_norm_projected=factor * scale * update_operated**0.5,
                    lora_b=lora_b._replace(values=torch.empty(0)),
                    lora_a=lora_a._replace(values=torch.empty(0)),
                    result=None if result is None else result[:, share] * lora_b.scale,
                    result_a=result_a,
                )
            )
        return outcomes
