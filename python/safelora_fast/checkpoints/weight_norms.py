"""Estimate the norm of a weight from a sample of its values, to judge how far apart two models are."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from safelora_fast.checkpoints.geometry import Block

MOST_VALUES = 1 << 15
UNRELATED = 0.5


def weight_norm(blocks: Sequence[Block]) -> float:
    """Estimate ‖W‖_F of a weight [m, n] in float64 from evenly spaced rows.

    The sample has about 32,768 values, but at least 16 rows of each block; small weights are read completely. The
    estimate only has to show whether ‖V‖ is about ‖W‖ or a thousandth of it, and 16 rows are accurate to a few percent.

    Args:
        blocks: the rows of the weight, each F32, BF16 or F16.
    """
    total, count = 0.0, 0
    most = MOST_VALUES // len(blocks)
    for block in blocks:
        width = {"F32": 4}.get(block.dtype, 2)
        stored = np.memmap(
            block.file.path, np.uint8, "r", block.begin + block.offset * width, block.rows * block.cols * width
        )
        rows = stored.view(f"<u{width}").reshape(block.rows, block.cols)
        step = max(1, -(-block.rows // max(16, most // block.cols)))
        chosen = _floats(np.ascontiguousarray(rows[::step]), block.dtype).astype(np.float64)
        total += float(np.square(chosen).sum()) * block.rows / len(chosen)
        count += block.rows
    return math.sqrt(total) if count else math.nan


def median_ratio(ratios: Iterable[float]) -> float:
    """Return the median of ‖V‖/‖W‖ over modules; NaN if no ratio is finite."""
    known = [ratio for ratio in ratios if math.isfinite(ratio)]
    return statistics.median(known) if known else math.nan


def far_apart(ratio: float) -> str | None:
    """Return a warning if ‖V‖ is about as large as the norm of the weights, as for unrelated models; otherwise None."""
    if not ratio >= UNRELATED:
        return None
    return (
        f"the median ‖V‖/‖W_aligned‖ is {ratio:.2g}: aligned and base differ about as much as unrelated models do, so V is hardly "
        "what alignment has changed; is base the model that aligned was made from?"
    )


def _floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float32 if dtype == "F32" else np.float16)
