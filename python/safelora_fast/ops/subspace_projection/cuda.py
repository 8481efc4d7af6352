"""Products of many tall matrices with thin factors on NVIDIA GPUs: one launch for all modules of the same kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from safelora_fast.ops import cuda_runtime
from safelora_fast.ops.base import DTYPE_NAMES
from safelora_fast.ops.plans import uploaded
from safelora_fast.ops.subspace_projection.torch_impl import ALIGNMENT, GroupedProjector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast._core import CudaPlan
    from safelora_fast.ops.subspace_projection.torch_impl import Matrix


class Backend(cuda_runtime.CudaBackend, GroupedProjector):
    """The extension module makes and caches the launch plans. Partial sums are added in a fixed order."""

    def prepared(
        self,
        matrices: Sequence[Matrix],
        factors: Sequence[torch.Tensor],
        *,
        transposed: bool,
        outputs: Sequence[torch.Tensor] | None = None,
    ) -> Products:
        """Return the launches of Mᵀ·X or M·X of every module (torch_impl.py)."""
        return Products(matrices, factors, transposed=transposed, outputs=outputs)


class Products:
    """Launches of the products of many modules, for one call or for many (`Prepared`)."""

    def __init__(
        self,
        matrices: Sequence[Matrix],
        factors: Sequence[torch.Tensor],
        *,
        transposed: bool,
        outputs: Sequence[torch.Tensor] | None,
    ) -> None:
        self._given, self._transposed, self._device = (matrices, factors), transposed, factors[0].device
        self._addresses = None if outputs is None else [output.data_ptr() for output in outputs]
        self._lowest = None if outputs is None else min(outputs, key=torch.Tensor.data_ptr)
        self._prepare(cuda_runtime.place(self._device))

    def _prepare(self, place: tuple[int, int]) -> None:
        """Find the plan for a stream, or make it and upload its table."""
        plan = self._found(place)
        if plan is None:
            matrices, factors = self._given
            self._given = [_readable(matrix) for matrix in matrices], [_aligned(factor) for factor in factors]
            plan = self._found(place)
            assert plan is not None  # noqa: S101
        if plan.memory is None:
            table = uploaded([np.frombuffer(plan.table, np.uint8)], self._device)
            plan.keep((table, [(start, shape) for start, _, shape in plan.places], [at for _, at, _ in plan.places]))
        self._stream, self._plan = place, plan
        ((self._table,), _), self.places, self._squares = plan.memory
        self.size, *self._scratch = plan.sizes

    def _found(self, place: tuple[int, int]) -> CudaPlan | None:
        captured = cuda_runtime.is_captured(self._device)
        return cuda_runtime.runtime().plan(
            place, *self._given, DTYPE_NAMES, transposed=self._transposed, captured=captured, results=self._addresses
        )

    def __call__(self, results: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Launch; return the memory of all results, and ‖M‖²_F (zero for a single matrix)."""
        place = cuda_runtime.place(self._device)
        if place != self._stream:
            self._prepare(place)
        partial, partial_squares = self._scratch
        flat = self._lowest if results is None else results
        if flat is None:
            flat = torch.empty(self.size, dtype=torch.float32, device=self._device)
        sums = torch.empty(partial, dtype=torch.float32, device=self._device)
        parts = torch.empty(partial_squares, dtype=torch.float64, device=self._device)
        squares = torch.zeros(len(self.places), dtype=torch.float32, device=self._device)
        addresses = (self._table.data_ptr(), flat.data_ptr(), sums.data_ptr(), parts.data_ptr(), squares.data_ptr())
        cuda_runtime.runtime().products(place, self._plan, addresses)
        if self._transposed and self._squares != list(range(len(self._squares))):
            squares = torch.stack([squares[index] for index in self._squares])
        return flat, squares


def _readable(matrix: Matrix) -> Matrix:
    """Convert a pair to one dtype, and make rows or columns contiguous; copies only if needed."""
    if not isinstance(matrix, tuple):
        return matrix if _has_contiguous_rows(matrix) or _has_contiguous_rows(matrix.mT) else matrix.contiguous()
    first, second = matrix
    if first.dtype != second.dtype:
        first, second = first.float(), second.float()
    for one, other in ((first, second), (first.mT, second.mT)):
        if _has_contiguous_rows(one) and _has_contiguous_rows(other):
            return first, second
    return first.contiguous(), second.contiguous()


def _has_contiguous_rows(matrix: torch.Tensor) -> bool:
    return bool((matrix.stride(1) == 1 or matrix.shape[1] == 1) and matrix.stride(0) >= matrix.shape[1])


def _aligned(factor: torch.Tensor) -> torch.Tensor:
    thin = factor.detach().float().contiguous()
    return thin.clone() if thin.data_ptr() % ALIGNMENT else thin
