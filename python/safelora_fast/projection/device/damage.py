"""What is wrong with weights or factors on a device, in the words of the extension."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from safelora_fast.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from safelora_fast.projection.device.reader import Pair


def not_finite(matrix: torch.Tensor, path: str, tensor: str) -> CheckpointError | None:
    """The error that names the first NaN or infinity of a stored matrix, None where there is none."""
    bad = ~matrix.isfinite()
    if not bool(bad.any()):
        return None
    row, column = bad.nonzero()[0].tolist()
    value = float(matrix[row, column])
    return CheckpointError(
        f'{path}: tensor "{tensor}" holds {"NaN" if math.isnan(value) else value} at row {row}, column {column}; the '
        "checkpoint is damaged or its training diverged"
    )


def damage(pair: Pair) -> CheckpointError:
    """Why the products with V of a module are not finite: which weight is not, or that V is too large."""
    wanted = pair.wanted
    for block, part in zip(wanted.blocks, pair.parts, strict=True):
        problem = not_finite(part, block.file.path, block.tensor)
        if problem is not None:
            return problem
    name = wanted.planned.name
    if wanted.resident is not None and not bool(wanted.resident.isfinite().all()):
        return CheckpointError(f"module {name}: the model's weight holds NaN or infinity; it is damaged")
    return CheckpointError(
        f"module {name}: the products with V leave the range of float32; the weights are damaged or not on their usual scale"
    )
