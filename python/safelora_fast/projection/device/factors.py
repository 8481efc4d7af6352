"""LoRA factors on a device, and errors about NaN or infinity with the same messages as in the Rust extension."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from safelora_fast.errors import CheckpointError
from safelora_fast.projection.device.reader import DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.checkpoints.adapter import Adapter
    from safelora_fast.checkpoints.experts import Slice
    from safelora_fast.projection.device.reader import Pair


class Factor(NamedTuple):
    """lora_B or lora_A of one adapter, scaled so that its products stay in the range of float32.

    Attributes:
        values: float32 on the device; the largest magnitude is between 0.5 and 1.
        scale: the power of two that `values` were divided by; 1 if the factor is zero.
        stored_as: the stored dtype, in safetensors notation.
        where: file and tensor name, for messages.
    """

    values: torch.Tensor
    scale: float
    stored_as: str
    where: tuple[str, str]


class FactorReader:
    """Reads the factors of a plan's modules.

    Args:
        adapters: the plan's adapters.
        device: the device for the factors.
    """

    def __init__(self, adapters: Sequence[Adapter], device: torch.device) -> None:
        self._adapters, self._device = adapters, device
        self._tensor = lru_cache(maxsize=8)(self._read)  # one tensor holds the factors of all experts

    def read(self, adapter: int, part: Slice) -> Factor:
        """Read B [m, r] or A [r, n].

        Raises:
            CheckpointError: an element is NaN or infinite.
        """
        stored_as, tensor = self._tensor(adapter, part.key)
        stored = tensor.as_strided((part.rows, part.cols), (part.row_stride, part.col_stride), part.offset)
        where = self._adapters[adapter].file.path, part.key
        problem = _not_finite(stored, *where)
        if problem is not None:
            raise problem
        largest = float(stored.abs().max())
        scale = 2.0 ** math.frexp(largest)[1] if largest else 1.0
        return Factor((stored.double() / scale).float().to(self._device), scale, stored_as, where)

    def _read(self, adapter: int, key: str) -> tuple[str, torch.Tensor]:
        file = self._adapters[adapter].file
        stored_as = file.tensors[key][0]
        return stored_as, torch.frombuffer(bytearray(file.read(key)), dtype=DTYPES[stored_as])


def damage(pair: Pair) -> CheckpointError:
    """Return the error for non-finite products with V: a weight is not finite, or V is too large."""
    wanted, name = pair.wanted, pair.wanted.planned.name
    for block, part in zip(wanted.blocks, pair.parts, strict=True):
        problem = _not_finite(part, block.file.path, block.tensor)
        if problem is not None:
            return problem
    if wanted.resident is not None and not bool(wanted.resident.isfinite().all()):
        return CheckpointError(f"module {name}: the model's weight holds NaN or infinity; it is damaged")
    return CheckpointError(
        f"module {name}: the products with V leave the range of float32; the weights are damaged or not on their usual scale"
    )


def _not_finite(matrix: torch.Tensor, path: str, tensor: str) -> CheckpointError | None:
    """Return the error for the first NaN or infinity in a stored matrix; None if all values are finite."""
    bad = ~matrix.isfinite()
    if not bool(bad.any()):
        return None
    row, column = bad.nonzero()[0].tolist()
    value = float(matrix[row, column])
    return CheckpointError(
        f'{path}: tensor "{tensor}" holds {"NaN" if math.isnan(value) else value} at row {row}, column {column}; the '
        "checkpoint is damaged or its training diverged"
    )
