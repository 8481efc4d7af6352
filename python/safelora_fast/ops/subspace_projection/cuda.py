"""Products of many tall matrices with thin factors on NVIDIA GPUs: one launch for all modules that are alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from safelora_fast import _core
from safelora_fast.ops import cuda_runtime
from safelora_fast.ops.base import DTYPE_NAMES
from safelora_fast.ops.plans import Plans, uploaded
from safelora_fast.ops.subspace_projection.torch_impl import Projector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.ops.subspace_projection import Matrix

_ALIGNMENT = 16  # bytes, of a factor


class Backend(cuda_runtime.CudaBackend, Projector):
    """Parts are added in an order of their own."""

    def transposed_products(
        self, matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Mᵀ·X of every module, and ‖M‖²_F of the pairs [modules], float32."""
        results, squares = _products(matrices, factors, transposed=True)
        return results, torch.stack(squares)

    def products(self, matrices: Sequence[Matrix], factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """M·X of every module, float32."""
        return _products(matrices, factors, transposed=False)[0]


class _Key(NamedTuple):
    """What the modules of one launch have in common."""

    device: torch.device
    form: Literal["transposed", "straight"]
    dtype: Literal["F32", "BF16", "F16"]
    is_pair: bool


@dataclass
class _Group:
    """Modules that one launch serves.

    Attributes:
        owners: which module each is of.
        operands: as the plan of the extension module takes them.
        shapes: of the results.
        held: tensors that the operands lie in, copies among them.
    """

    owners: list[int] = field(default_factory=list)
    operands: list[tuple[tuple[int, int], tuple[int, int], tuple[int, int], int, int]] = field(default_factory=list)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    held: list[torch.Tensor] = field(default_factory=list)


class _Plan(NamedTuple):
    plan: _core.CudaPlan
    table: torch.Tensor
    host: torch.Tensor


_plans: Plans[_Plan] = Plans()


def _products(
    matrices: Sequence[Matrix], factors: Sequence[torch.Tensor], *, transposed: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The products, and ‖M‖²_F (zero for a matrix alone)."""
    groups: dict[_Key, _Group] = {}
    for index, (matrix, factor) in enumerate(zip(matrices, factors, strict=True)):
        _add(groups, index, matrix, factor, transposed=transposed)
    results: dict[int, torch.Tensor] = {}
    squares: dict[int, torch.Tensor] = {}
    for key, group in groups.items():
        plan = _plan(key, group)
        flat, partial = (
            torch.empty(size, dtype=torch.float32, device=key.device) for size in (plan.plan.results, plan.plan.partial)
        )
        partial_squares = torch.empty(plan.plan.partial_squares, dtype=torch.float64, device=key.device)
        of_group = torch.zeros(len(group.owners), dtype=torch.float32, device=key.device)
        cuda_runtime.runtime().products(
            cuda_runtime.place(key.device),
            plan.plan,
            (
                plan.table.data_ptr(),
                flat.data_ptr(),
                partial.data_ptr(),
                partial_squares.data_ptr(),
                of_group.data_ptr(),
            ),
        )
        for place, (owner, offset) in enumerate(zip(group.owners, plan.plan.offsets, strict=True)):
            rows, rank = group.shapes[place]
            results[owner] = flat[offset : offset + rows * rank].view(rows, rank)
            squares[owner] = of_group[place]
    count = range(len(matrices))
    return [results[index] for index in count], [squares[index] for index in count]


def _add(groups: dict[_Key, _Group], index: int, matrix: Matrix, factor: torch.Tensor, *, transposed: bool) -> None:
    """Put a module where it is computed; a matrix whose columns are contiguous is read as its transpose."""
    parts = [part.detach() for part in (matrix if isinstance(matrix, tuple) else (matrix,))]
    if any(part.dtype != parts[0].dtype for part in parts):
        parts = [part.float() for part in parts]
    if not all(map(_rows_contiguous, parts)):
        turned = [part.mT for part in parts]
        if all(map(_rows_contiguous, turned)):
            parts, transposed = turned, not transposed
        else:
            parts = [part.contiguous() for part in parts]
    thin = factor.detach().float().contiguous()
    if thin.data_ptr() % _ALIGNMENT:
        thin = thin.clone()
    rows, columns = parts[0].shape
    key = _Key(thin.device, "transposed" if transposed else "straight", DTYPE_NAMES[parts[0].dtype], len(parts) > 1)
    group = groups.setdefault(key, _Group())
    first, last = ((part.data_ptr(), part.stride(0)) for part in (parts[0], parts[-1]))
    group.owners.append(index)
    group.operands.append((first, last, (rows, columns), thin.data_ptr(), thin.shape[1]))
    group.shapes.append((columns if transposed else rows, thin.shape[1]))
    group.held += [*parts, thin]


def _plan(key: _Key, group: _Group) -> _Plan:
    """The plan and its table on the device, made once for as long as everything stays where it is."""

    def make() -> _Plan:
        plan = _core.CudaPlan(group.operands, form=key.form, dtype=key.dtype, is_pair=key.is_pair)
        (table,), host = uploaded([np.frombuffer(plan.table, np.uint8)], key.device)
        return _Plan(plan, table, host)

    return _plans.find((key, *group.operands), key.device, make)


def _rows_contiguous(matrix: torch.Tensor) -> bool:
    return bool((matrix.stride(1) == 1 or matrix.shape[1] == 1) and matrix.stride(0) >= matrix.shape[1])
