"""Products of many tall matrices with thin factors by Triton: one launch for all modules of the same kind."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from safelora_fast.ops import triton_runtime
from safelora_fast.ops.plans import Plans, current_stream, uploaded
from safelora_fast.ops.subspace_projection.torch_impl import GroupedProjector
from safelora_fast.ops.triton_runtime import power_of_two, tiles

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from safelora_fast.ops.subspace_projection.torch_impl import Matrix, Place

WIDTH = 64  # columns of a factor per program; wider factors are split
CHUNK = 1024  # rows that a program of transposed_parts adds up
COLUMN_TILE = 64  # most columns of a program of transposed_parts
ROW_TILE = 64  # rows that a program of products writes
STEP = 32  # rows or columns multiplied at once
LEAST = 16  # fewest rows and columns of a product on tensor cores


class Backend(triton_runtime.TritonBackend, GroupedProjector):
    """One launch for each pass. Partial sums over rows are added in a fixed order."""

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
        self._transposed, self._device = transposed, factors[0].device
        self.places, self.size, self._is_partial = _layout(matrices, 1 if transposed else 0, factors)
        self._first = None if outputs is None else outputs[0]
        if outputs is not None:
            self.places = [
                (_distance(output, outputs[0]), shape) for output, (_, shape) in zip(outputs, self.places, strict=True)
            ]
        self._groups = list(_groups(matrices, factors, [start for start, _ in self.places]))
        self._prepare(current_stream(self._device))

    def _prepare(self, stream: Hashable) -> None:
        """Find the plans for a stream, or make them and upload their tables."""
        make = _transposed_plan if self._transposed else _plain_plan
        self._stream, self._plans = stream, [group.plan(make) for group in self._groups]

    def __call__(self, results: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Launch; return the memory of all results, and ‖M‖²_F (zero for a single matrix)."""
        stream = current_stream(self._device)
        if stream != self._stream:
            self._prepare(stream)
        make = torch.zeros if self._is_partial else torch.empty
        flat = self._first if results is None else results
        if flat is None:
            flat = make(self.size, dtype=torch.float32, device=self._device)
        squares = torch.zeros(len(self.places), dtype=torch.float32, device=self._device)
        with triton_runtime.on(self._device):
            for group, plan in zip(self._groups, self._plans, strict=True):
                if self._transposed:
                    self._launch_transposed(group, plan, flat, squares)
                else:
                    self._launch_plain(group, plan, flat)
        return flat, squares

    @staticmethod
    def _launch_transposed(group: _Group, plan: _Plan, flat: torch.Tensor, squares: torch.Tensor) -> None:
        from safelora_fast.ops.subspace_projection import triton_kernels

        make = {"dtype": torch.float32, "device": flat.device}
        parts, part_squares = (
            torch.empty(len(plan.work), plan.tile, plan.width, **make),
            torch.empty(len(plan.work), **make),
        )
        sums = torch.zeros(len(squares), plan.most, **make) if group.key.is_pair else squares
        triton_kernels.transposed_parts[len(plan.work),](
            *group.operands, plan.table, plan.work, parts, part_squares,
            CHUNK=CHUNK, STEP=STEP, TILE=plan.tile, WIDTH=plan.width,
            TURNED=group.key.dtypes[0] == torch.float32, **group.settings(),
        )  # fmt: skip
        triton_kernels.combine_parts[len(plan.combine),](
            plan.table, plan.combine, parts, part_squares, flat, sums,
            TILE=plan.tile, WIDTH=plan.width, PAIR=group.key.is_pair, **triton_runtime.OPTIONS,
        )  # fmt: skip
        if group.key.is_pair:
            squares += sums.sum(1)

    @staticmethod
    def _launch_plain(group: _Group, plan: _Plan, flat: torch.Tensor) -> None:
        from safelora_fast.ops.subspace_projection import triton_kernels

        triton_kernels.products[len(plan.work),](
            *group.operands, plan.table, plan.work, flat,
            STEP=STEP, TILE=plan.tile, WIDTH=plan.width, **group.settings(),
        )  # fmt: skip


class _Key(NamedTuple):
    """What modules must share to be in one launch."""

    dtypes: tuple[torch.dtype, ...]
    is_pair: bool
    is_flipped: bool
    is_thin_flipped: bool
    aligned: int
    thin_aligned: int


@dataclass(frozen=True)
class _Group:
    """Modules that one launch can serve; usually all of them.

    Attributes:
        key: what they share.
        operands: minuend, subtrahend and factor of the first module.
        entries: rows of the table in triton_kernels.py; a module with a factor wider than WIDTH has several.
        owners: the module of each entry.
        held: the operands, so that temporary copies live until the launch.
    """

    key: _Key
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    entries: list[tuple[int, ...]] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    held: list[torch.Tensor] = field(default_factory=list)

    def add(self, module: int, operands: Sequence[torch.Tensor], output: int) -> None:
        """Add a module. Its result starts at element `output`, with rows as wide as its factor."""
        along = 1 if self.key.is_flipped else 0
        minuend, subtrahend, factor = operands
        places = [_distance(*ends) for ends in zip(operands, self.operands, strict=True)]
        rank, thin_along = factor.shape[1], 1 if self.key.is_thin_flipped else 0
        for start in range(0, rank, WIDTH):
            self.entries.append((
                places[0], minuend.stride(along), places[1], subtrahend.stride(along), *minuend.shape,
                places[2] + start * factor.stride(1), factor.stride(thin_along), min(WIDTH, rank - start), output + start, rank,
            ))  # fmt: skip
            self.owners.append(module)

    def plan(self, make: Callable[[_Group], _Plan]) -> _Plan:
        """Return the plan, which is reused while all operands stay in place."""
        device = self.operands[0].device
        name = make, self.key, device, tuple(self.entries), tuple(self.owners)
        return _plans.find(name, device, lambda: make(self))

    def settings(self) -> dict[str, Any]:
        """Compile-time constants of the kernels that read matrices."""
        return {
            "PAIR": self.key.is_pair,
            "FLIPPED": self.key.is_flipped,
            "THIN_FLIPPED": self.key.is_thin_flipped,
            "ALIGNED": self.key.aligned,
            "THIN_ALIGNED": self.key.thin_aligned,
            "PRECISION": "tf32x3" if _has_tf32(self.operands[0].device) else "ieee",
            **triton_runtime.OPTIONS,
        }

    def uploaded(self, *arrays: np.ndarray) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Copy the entries and these arrays to the device; also return the host memory."""
        return uploaded([np.array(self.entries, dtype=np.int64), *arrays], self.operands[0].device)


@dataclass(frozen=True)
class _Plan:
    """Work of each program, on the device; triton_kernels.py describes the columns.

    Attributes:
        table: where the operands of each entry are.
        work: one row for each program.
        tile: rows or columns that a program writes.
        width: columns of the factor that it takes.
        host: host memory that the tensors were copied from.
        combine: one row for each program of combine_parts.
        most: most tiles of any module.
    """

    table: torch.Tensor
    work: torch.Tensor
    tile: int
    width: int
    host: torch.Tensor
    combine: torch.Tensor
    most: int = 0


_plans: Plans[_Plan] = Plans()


def _transposed_plan(group: _Group) -> _Plan:
    tile = min(max(power_of_two(max(entry[5] for entry in group.entries)), LEAST), COLUMN_TILE)
    items: list[tuple[int, int, int, int]] = []
    combine: list[tuple[int, int, int, int, int]] = []
    most = max(tiles(entry[5], tile) for entry in group.entries)
    seen: set[int] = set()
    for number, (entry, owner) in enumerate(zip(group.entries, group.owners, strict=True)):
        rows, columns = entry[4], entry[5]
        for first in range(0, columns, tile):
            place = -1 if owner in seen else owner * most + first // tile
            combine.append((number, first, len(items), tiles(rows, CHUNK), place))
            items += [(number, first, begin, len(items) + step) for step, begin in enumerate(range(0, rows, CHUNK))]
        seen.add(owner)
    items.sort(key=lambda item: -min(group.entries[item[0]][4] - item[2], CHUNK))
    (table, work, on_device), host = group.uploaded(np.array(items, np.int32), np.array(combine, np.int32))
    return _Plan(table, work, tile, _width(group), host, on_device, most)


def _plain_plan(group: _Group) -> _Plan:
    items = [(number, first) for number, entry in enumerate(group.entries) for first in range(0, entry[4], ROW_TILE)]
    items.sort(key=lambda item: -group.entries[item[0]][5])
    (table, work), host = group.uploaded(np.array(items, np.int32))
    return _Plan(table, work, ROW_TILE, _width(group), host, work[:0])


def _width(group: _Group) -> int:
    return max(power_of_two(max(entry[8] for entry in group.entries)), LEAST)


def _groups(matrices: Sequence[Matrix], factors: Sequence[torch.Tensor], places: Sequence[int]) -> Iterable[_Group]:
    groups: dict[_Key, _Group] = {}
    for module, (matrix, factor) in enumerate(zip(matrices, factors, strict=True)):
        pair = matrix if isinstance(matrix, tuple) else (matrix, matrix)
        if not (pair[0].numel() and factor.numel()):
            continue
        is_flipped, is_thin_flipped = _is_flipped(*pair), _is_flipped(factor)
        along = 1 if is_flipped else 0
        parts = [_contiguous(part, 1 - along).detach() for part in pair]
        thin = _contiguous(factor, 0 if is_thin_flipped else 1).detach()
        operands = (parts[0], parts[1], thin)
        key = _Key(
            tuple(part.dtype for part in operands),
            isinstance(matrix, tuple),
            is_flipped,
            is_thin_flipped,
            16 if all(_is_multiple(part, along, 16) for part in parts) else 1,
            8 if _is_multiple(thin, 1 if is_thin_flipped else 0, 8) else 1,
        )
        group = groups.setdefault(key, _Group(key, operands))
        group.add(module, operands, places[module])
        group.held.extend(operands)
    return groups.values()


def _is_flipped(*parts: torch.Tensor) -> bool:
    """Whether the matrices are stored by columns."""
    return all(part.stride(0) == 1 for part in parts) and any(part.stride(1) != 1 for part in parts)


def _is_multiple(part: torch.Tensor, along: int, count: int) -> bool:
    """Whether address, stride and size along the contiguous axis are multiples of `count` elements."""
    at, stride, size = part.data_ptr() // part.element_size(), part.stride(along), part.shape[1 - along]
    return not (at % count or stride % count or size % count)


def _contiguous(part: torch.Tensor, axis: int) -> torch.Tensor:
    return part if part.stride(axis) == 1 else part.contiguous()


def _layout(matrices: Sequence[Matrix], axis: int, factors: Sequence[torch.Tensor]) -> tuple[list[Place], int, bool]:
    """Where each result starts and its shape, the elements of all, and whether some have nothing to add up."""
    wholes = [matrix[0] if isinstance(matrix, tuple) else matrix for matrix in matrices]
    shapes = [(whole.shape[axis], factor.shape[1]) for whole, factor in zip(wholes, factors, strict=True)]
    *starts, size = itertools.accumulate((-(-rows * rank // 16) * 16 for rows, rank in shapes), initial=0)
    return list(zip(starts, shapes, strict=True)), size, not all(whole.numel() for whole in wholes)


def _has_tf32(device: torch.device) -> bool:
    """Whether float32 products can be split in three for tensor cores; elsewhere they are multiplied directly."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def _distance(tensor: torch.Tensor, other: torch.Tensor) -> int:
    """Number of elements between two tensors."""
    apart: int = (tensor.data_ptr() - other.data_ptr()) // tensor.element_size()
    return apart
