"""The projected adapter on disk: a byte-for-byte copy of the input in which single blocks are replaced.

Header, key order, dtypes, metadata and every tensor that is not projected stay what they were because nobody rewrites them.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from safelora_fast.posthoc.adapter import CONFIG, WEIGHTS, Adapter

if TYPE_CHECKING:
    from pathlib import Path

    from safelora_fast.posthoc.jobs import Target

BITS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<u4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<u2")}


class AdapterWriter:
    """Writes one adapter into a folder that does not exist yet."""

    def __init__(self, adapter: Adapter, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.adapter = adapter
        self.folder = folder
        self._tensors = adapter.file.tensors
        shutil.copyfile(adapter.path / CONFIG, folder / CONFIG)
        shutil.copyfile(adapter.file.path, folder / WEIGHTS)

    def write(self, target: Target, block: bytes) -> None:
        """Replace the block of `target` by (m, r) row-major elements of the tensor's own dtype."""
        view = self._block(self.folder / WEIGHTS, target, "r+")
        view[...] = np.frombuffer(block, view.dtype).reshape(view.shape)

    def restore(self, target: Target) -> None:
        """Put back what the input holds there."""
        self._block(self.folder / WEIGHTS, target, "r+")[...] = self._block(self.adapter.file.path, target, "r")

    def _block(self, path: Path | str, target: Target, mode: Literal["r", "r+"]) -> np.ndarray[Any, Any]:
        dtype, _, begin, end = self._tensors[target.key]
        bits = BITS[dtype]
        elements = np.memmap(path, np.uint8, mode, begin, end - begin).view(bits)
        strides = target.row_stride * bits.itemsize, target.col_stride * bits.itemsize
        start = elements[target.offset :]
        return np.lib.stride_tricks.as_strided(start, (target.rows, target.cols), strides, writeable=mode != "r")
