"""Values of an adapter's tensors that are NaN or infinite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from safelora_fast import _core

# An element is NaN or infinite when all bits of its exponent are set.
EXPONENTS: dict[str, tuple[np.dtype[Any], int]] = {
    "F64": (np.dtype("<u8"), 0x7FF0_0000_0000_0000),
    "F32": (np.dtype("<u4"), 0x7F80_0000),
    "BF16": (np.dtype("<u2"), 0x7F80),
    "F16": (np.dtype("<u2"), 0x7C00),
}
PIECE = 1 << 24


def count_not_finite(file: _core.SafetensorsFile, tensor: str) -> int:
    """How many values of a tensor are NaN or infinite; 0 for dtypes other than F64, F32, BF16 and F16."""
    dtype, _, begin, end = file.tensors[tensor]
    if dtype not in EXPONENTS or begin == end:
        return 0
    bits, exponent = EXPONENTS[dtype]
    stored = np.memmap(file.path, np.uint8, "r", begin, end - begin)
    pieces = (stored[start : start + PIECE].view(bits) for start in range(0, len(stored), PIECE))
    return sum(int(np.count_nonzero(piece & exponent == exponent)) for piece in pieces)
