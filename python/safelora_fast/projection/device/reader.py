"""Pairs of weights on a device, in batches: the next batch is read from the files while the current one is in use.

Two buffers in (pinned) host memory alternate. Each has at most BATCH_BYTES, or the size of one larger module. The
device holds one batch with its factors and products. Weights that a model already has on the device are not read.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from safelora_fast import _core

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future

    from safelora_fast.checkpoints.geometry import Block
    from safelora_fast.projection.jobs import PlannedModule

BATCH_BYTES = 512 << 20
ALIGNMENT = 256  # bytes; kernels load 16 bytes at a time
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Wanted:
    """A module to read: its position in the plan, and the aligned weight if it is already on the device."""

    index: int
    planned: PlannedModule
    resident: torch.Tensor | None = None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks to read: those of the aligned weight (unless it is on the device), then those of the base."""
        group = self.planned.group
        return group.base if self.resident is not None else group.aligned + group.base

    @cached_property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(block.view().nbytes for block in self.blocks)

    @cached_property
    def room(self) -> int:
        """Bytes in the buffer, with each block at a multiple of ALIGNMENT."""
        return sum(_aligned(block.view().nbytes) for block in self.blocks)


@dataclass(frozen=True)
class Pair:
    """Both weights of a module on the device, [m, n] each; `parts` are the blocks as read from the files."""

    wanted: Wanted
    aligned: torch.Tensor
    base: torch.Tensor
    parts: tuple[torch.Tensor, ...]


class WeightReader:
    """Yields batches of pairs; a batch is valid until the next one is requested.

    Args:
        modules: the modules in the order in which to read them.
        device: the device for the weights.
        threads: the number of threads that read.
        batch_bytes: the largest size of a batch, unless one module is larger.
    """

    def __init__(
        self, modules: Sequence[Wanted], device: torch.device, *, threads: int | None, batch_bytes: int = BATCH_BYTES
    ) -> None:
        self._batches = list(_batches(modules, batch_bytes))
        self._device, self._threads = device, threads
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="safelora-fast-reader")
        self._closed = False

    def __iter__(self) -> Iterator[list[Pair]]:
        """Yield the batches on the device; stop after :meth:`close`."""
        if not self._batches:
            return
        size = max(sum(wanted.room for wanted in batch) for batch in self._batches)
        pinned = self._device.type == "cuda"
        buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in self._batches[:2]]
        ahead = self._read(0, buffers)
        for number, batch in enumerate(self._batches):
            if self._closed:
                return
            ahead.result()
            # The other buffer is free: its batch was copied to the device.
            if number + 1 < len(self._batches):
                ahead = self._read(number + 1, buffers)
            filled = buffers[number % 2][: sum(wanted.room for wanted in batch)]
            yield _cut(batch, filled.to(self._device, non_blocking=True))

    def close(self) -> None:
        """Stop reading: wait for the read in progress, and ignore its failure."""
        self._closed = True
        self._reader.shutdown(cancel_futures=True)

    def _read(self, number: int, buffers: Sequence[torch.Tensor]) -> Future[None]:
        """Start filling a buffer with a batch on the reader's thread."""
        views = [block.view() for wanted in self._batches[number] for block in wanted.blocks]
        return self._reader.submit(_fill, buffers[number % 2], views, self._threads)


def _fill(buffer: torch.Tensor, views: Sequence[_core.View], threads: int | None) -> None:
    """Copy views into a buffer, each at a multiple of ALIGNMENT; the argument keeps the buffer alive meanwhile."""
    targets, place = [], buffer.data_ptr()
    for view in views:
        targets.append((place, view.nbytes))
        place += _aligned(view.nbytes)
    _core.copy_views(views, targets, threads=threads)


def dtype_of(block: Block) -> torch.dtype:
    """Return the dtype of a stored block."""
    return DTYPES[block.file.tensors[block.tensor][0]]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _batches(modules: Sequence[Wanted], most: int) -> Iterator[list[Wanted]]:
    batch: list[Wanted] = []
    for wanted in modules:
        if batch and sum(other.room for other in batch) + wanted.room > most:
            yield batch
            batch = []
        batch.append(wanted)
    if batch:
        yield batch


def _cut(batch: Sequence[Wanted], whole: torch.Tensor) -> list[Pair]:
    """Return the pairs of a batch as views of its memory."""
    pairs, place = [], 0
    for wanted in batch:
        parts = []
        for block in wanted.blocks:
            dtype = dtype_of(block)
            end = place + block.rows * block.cols * dtype.itemsize
            parts.append(whole[place:end].view(dtype).view(block.rows, block.cols))
            place += _aligned(end - place)
        group = wanted.planned.group
        base = _stacked(parts[-len(group.base) :])
        aligned = _stacked(parts[: -len(group.base)]) if wanted.resident is None else wanted.resident
        if group.transposed:
            aligned, base = aligned.mT, base.mT
        pairs.append(Pair(wanted, aligned, base, tuple(parts)))
    return pairs


def _stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate blocks of rows; a single block is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
