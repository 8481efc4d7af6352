"""B ← P_k·B of all modules on one GPU in three launches that are planned once and write into B."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import torch

from safelora_fast.ops.subspace_projection import prepared_products
from safelora_fast.ops.subspace_projection.torch_impl import views

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.ops.subspace_projection.torch_impl import Place, Prepared


class GroupedProjection:
    """The projection of many lora_B that stay where they are; `of` makes it. Call the methods in this order, at each step."""

    def __init__(
        self,
        inner: Prepared,
        bases: Sequence[torch.Tensor],
        lora_bs: Sequence[torch.Tensor],
        lora_as: Sequence[torch.Tensor],
    ) -> None:
        self._inner = inner
        self._found = torch.zeros(inner.size, dtype=torch.float32, device=lora_bs[0].device)
        products = views(self._found, inner.places[: len(lora_bs)])
        self._outer = _expected(prepared_products(bases, products, transposed=False, outputs=lora_bs))
        alone = products[: len(lora_as)]
        self._grams = _expected(prepared_products(alone, alone, transposed=True))
        self._lora_bs = list(lora_bs)
        # For each rank: where (UᵀB)ᵀ(UᵀB) and BᵀB are, and A by shape.
        self._ranks, start = [], 0
        for _, alike in groupby(lora_as, key=len):
            groups = [list(same) for _, same in groupby(alike, key=lambda lora_a: lora_a.shape)]
            stop = start + sum(map(len, groups))
            theirs = self._inner.places[len(lora_bs) + start : len(lora_bs) + stop]
            self._ranks.append((_together(self._grams.places[start:stop]), _together(theirs), groups))
            start = stop

    @classmethod
    def of(
        cls, bases: Sequence[torch.Tensor], lora_bs: Sequence[torch.Tensor], lora_as: Sequence[torch.Tensor]
    ) -> GroupedProjection | None:
        """Plan the launches; return None if the backend has none for many modules, or cannot read these in place.

        Args:
            bases: U [m, k] of each lora_B.
            lora_bs: B [m, r], then copies of some of them, which are only projected.
            lora_as: A [r, n] of each lora_B that is not a copy, with equal shapes next to each other, in the order of r.
        """
        alone = lora_bs[: len(lora_as)]
        inner = prepared_products([*bases, *alone], [*lora_bs, *alone], transposed=True)
        return None if inner is None else cls(inner, bases, lora_bs, lora_as)

    def first_not_finite(self) -> int | None:
        """Compute UᵀB and BᵀB; return the index of the first B whose products hold NaN or Inf, or None."""
        self._inner(self._found)
        if self._found.isfinite().all():
            return None
        found = (product.isfinite().all() for product in views(self._found, self._inner.places))
        return next(index for index, is_finite in enumerate(found) if not is_finite) % len(self._lora_bs)

    def write(self) -> None:
        """Replace every B by U(UᵀB)."""
        self._outer()
        torch.autograd.graph.increment_version(self._lora_bs)

    def lowest_cosine(self) -> torch.Tensor:
        """Return the lowest cosine of P_k·B·A and B·A with the B before `write`; Inf if no cosine is finite."""
        of_products, _ = self._grams()
        lowest = []
        for ours, theirs, groups in self._ranks:
            # The same AAᵀ is above and below the line, so its rounding, such as to tf32, hardly matters.
            stacked = [torch.cat(alike).view(len(alike), *alike[0].shape).float() for alike in groups]
            rights = torch.cat([whole @ whole.mT for whole in stacked])
            lowest.append(lowest_cosine(of_products.as_strided(*ours), self._found.as_strided(*theirs), rights))
        return torch.stack(lowest).min()


def lowest_cosine(projected: torch.Tensor, whole: torch.Tensor, rights: torch.Tensor) -> torch.Tensor:
    """Return the lowest cosine of P_k·B·A and B·A; Inf if none is finite.

    Args:
        projected: (UᵀB)ᵀ(UᵀB) [modules, r, r].
        whole: BᵀB.
        rights: AAᵀ.
    """
    cosines = ((projected * rights).sum((1, 2)) / (whole * rights).sum((1, 2))).sqrt()
    return torch.where(cosines.isfinite(), cosines, torch.inf).min()


def _expected(launches: Prepared | None) -> Prepared:
    assert launches is not None  # noqa: S101 -- the operands are as readable as those before
    return launches


def _together(places: Sequence[Place]) -> tuple[tuple[int, int, int], tuple[int, int, int], int]:
    """Shape, strides and start of results of one shape as one tensor [modules, rows, rank]."""
    start, (rows, rank) = places[0]
    step = (places[-1][0] - start) // max(len(places) - 1, 1)
    assert all(place == (start + index * step, (rows, rank)) for index, place in enumerate(places))  # noqa: S101
    return (len(places), rows, rank), (step, rank, 1), start
