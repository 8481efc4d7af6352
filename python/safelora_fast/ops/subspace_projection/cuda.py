"""Products of many tall matrices with thin factors on NVIDIA GPUs: one launch for all modules of the same kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from safelora_fast.ops import cuda_runtime
from safelora_fast.ops.base import DTYPE_NAMES
from safelora_fast.ops.plans import uploaded
from safelora_fast.ops.subspace_projection.torch_impl import Projector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.ops.subspace_projection import Matrix

_ALIGNMENT = 16  # bytes, for factors


class Backend(cuda_runtime.CudaBackend, Projector):
    """The extension module makes and caches the launch plans. Partial sums are added in a fixed order."""

    def transposed_products(
        self, matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return Mᵀ·X of every module, and ‖M‖²_F of the pairs [modules], float32."""
        return _products(matrices, factors, transposed=True)

    def products(self, matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return M·X of every module, float32."""
        return _products(matrices, factors, transposed=False)[0]


def _products(
    matrices: Sequence[Matrix], factors: Sequence[torch.Tensor], *, transposed: bool
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The products, and ‖M‖²_F (zero for a single matrix)."""
    device = factors[0].device
    runtime, place, in_graph = cuda_runtime.runtime(), cuda_runtime.place(device), cuda_runtime.is_captured(device)
    given = matrices, factors
    plan = runtime.plan(place, *given, DTYPE_NAMES, transposed=transposed, captured=in_graph)
    if plan is None:
        given = [_readable(matrix) for matrix in matrices], [_aligned(factor) for factor in factors]
        plan = runtime.plan(place, *given, DTYPE_NAMES, transposed=transposed, captured=in_graph)
        assert plan is not None  # noqa: S101
    if plan.memory is None:
        plan.keep((uploaded([np.frombuffer(plan.table, np.uint8)], device), plan.places))
    ((table,), _), places = plan.memory
    results, partial, partial_squares = plan.sizes
    flat, sums = (torch.empty(size, dtype=torch.float32, device=device) for size in (results, partial))
    parts = torch.empty(partial_squares, dtype=torch.float64, device=device)
    squares = torch.zeros(len(factors), dtype=torch.float32, device=device)
    addresses = (table.data_ptr(), flat.data_ptr(), sums.data_ptr(), parts.data_ptr(), squares.data_ptr())
    runtime.products(place, plan, addresses)
    found = [flat.as_strided((rows, rank), (rank, 1), start) for start, _, (rows, rank) in places]
    if transposed and any(square != index for index, (_, square, _) in enumerate(places)):
        squares = torch.stack([squares[square] for _, square, _ in places])
    return found, squares


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
    return thin.clone() if thin.data_ptr() % _ALIGNMENT else thin
