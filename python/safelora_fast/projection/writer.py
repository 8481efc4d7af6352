"""The projected adapter on disk: a byte-for-byte copy of the input in which single blocks are replaced.

Header, key order, dtypes, metadata and every tensor that is not projected stay what they were because nobody rewrites them;
only keys that PEFT would not read are renamed in the header.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from safelora_fast.checkpoints.adapter import WEIGHTS, Adapter
from safelora_fast.checkpoints.lora_config import CONFIG

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safelora_fast.projection.jobs import Target

BITS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<u4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<u2")}


class AdapterWriter:
    """Writes one adapter into a folder that does not exist yet."""

    def __init__(self, adapter: Adapter, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.adapter = adapter
        self.folder = folder
        self._tensors = adapter.file.tensors
        shutil.copyfile(adapter.path / CONFIG, folder / CONFIG)
        self._shift = _copy(adapter.file.path, folder / WEIGHTS, adapter.keys)

    def write(self, target: Target, block: bytes) -> None:
        """Replace the block of `target` by (m, r) row-major elements of the tensor's own dtype."""
        view = self._block(self.folder / WEIGHTS, target, "r+", self._shift)
        view[...] = np.frombuffer(block, view.dtype).reshape(view.shape)

    def restore(self, target: Target) -> None:
        """Put back what the input holds there."""
        written = self._block(self.folder / WEIGHTS, target, "r+", self._shift)
        written[...] = self._block(self.adapter.file.path, target, "r")

    def _block(
        self, path: Path | str, target: Target, mode: Literal["r", "r+"], shift: int = 0
    ) -> np.ndarray[Any, Any]:
        dtype, _, begin, end = self._tensors[target.key]
        bits = BITS[dtype]
        elements = np.memmap(path, np.uint8, mode, begin + shift, end - begin).view(bits)
        strides = target.row_stride * bits.itemsize, target.col_stride * bits.itemsize
        start = elements[target.offset :]
        return np.lib.stride_tricks.as_strided(start, (target.rows, target.cols), strides, writeable=mode != "r")


def _copy(source: str, target: Path, keys: Mapping[str, str]) -> int:
    """Copy a safetensors file under other keys; returns how much further back its data begin then, in bytes."""
    if all(key == new for key, new in keys.items()):
        shutil.copyfile(source, target)
        return 0
    with Path(source).open("rb") as former, target.open("wb") as file:
        size = int.from_bytes(former.read(8), "little")
        header = json.loads(former.read(size))
        text = json.dumps({keys.get(key, key): entry for key, entry in header.items()}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(former, file)
    return len(text) - size
