"""LoRA factors of adapters on disk as matrices on a device."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from safelora_fast.projection.device.damage import not_finite
from safelora_fast.projection.device.reader import DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.checkpoints.adapter import Adapter
    from safelora_fast.checkpoints.experts import Slice
    from safelora_fast.projection.jobs import AdapterFactors


class Factor(NamedTuple):
    """B or A of one adapter, scaled so that no product of it leaves the range of float32.

    Attributes:
        values: float32 on the device, the largest between a half and one.
        scale: the power of two that was divided by; 1 where the factor is zero.
        stored_as: dtype of its tensor, as safetensors spells it.
        where: file and tensor, for messages.
    """

    values: torch.Tensor
    scale: float
    stored_as: str
    where: tuple[str, str]


class FactorReader:
    """Reads the factors of a plan's modules.

    Args:
        adapters: of the plan.
        device: where the factors go.
    """

    def __init__(self, adapters: Sequence[Adapter], device: torch.device) -> None:
        self._adapters, self._device = adapters, device
        # The factors of all experts lie in one tensor.
        self._tensor = lru_cache(maxsize=8)(self._read)

    def left(self, factors: AdapterFactors) -> Factor:
        """B [m, r].

        Raises:
            CheckpointError: an element is NaN or infinite.
        """
        return self._factor(factors.adapter, factors.lora_b)

    def right(self, factors: AdapterFactors) -> Factor:
        """A [r, n].

        Raises:
            CheckpointError: an element is NaN or infinite.
        """
        return self._factor(factors.adapter, factors.lora_a)

    def _factor(self, adapter: int, part: Slice) -> Factor:
        stored_as, tensor = self._tensor(adapter, part.key)
        stored = tensor.as_strided((part.rows, part.cols), (part.row_stride, part.col_stride), part.offset)
        path = self._adapters[adapter].file.path
        problem = not_finite(stored, path, part.key)
        if problem is not None:
            raise problem
        largest = float(stored.abs().max())
        scale = 2.0 ** math.frexp(largest)[1] if largest else 1.0
        values = (stored.double() / scale).float().to(self._device)
        return Factor(values, scale, stored_as, (path, part.key))

    def _read(self, adapter: int, key: str) -> tuple[str, torch.Tensor]:
        file = self._adapters[adapter].file
        stored_as = file.tensors[key][0]
        return stored_as, torch.frombuffer(bytearray(file.read(key)), dtype=DTYPES[stored_as])
