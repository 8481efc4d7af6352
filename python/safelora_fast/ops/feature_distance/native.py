"""Feature distance on the CPU, by the extension module, in the tensors' own memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from safelora_fast import _core
from safelora_fast.ops.base import NativeBackend
from safelora_fast.ops.feature_distance.torch_impl import view_of

if TYPE_CHECKING:
    from safelora_fast.ops.feature_distance.torch_impl import Comparison


class Backend(NativeBackend):
    """Sums in float64 in one read. Tensors with a contiguous hidden axis are read in place, others are copied."""

    def forward(self, comparison: Comparison) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the distance and the factors."""
        features, references = comparison.for_extension()
        factors = comparison.empty_factors()
        mask, segments = comparison.mask.cpu(), comparison.segments
        if segments is not None:
            segments = segments.to(device="cpu", dtype=torch.int64)
        distance = _core.feature_distance(
            [view_of(layer) for layer in features],
            [view_of(reference) for reference in references],
            (mask.data_ptr(), mask.stride()),
            None if segments is None else (segments.data_ptr(), segments.stride()),
            factors.data_ptr(),
            normalize=comparison.normalize,
            threads=threads(),
        )
        return torch.tensor(distance, dtype=torch.float32), factors

    def backward(self, comparison: Comparison, factors: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
        """Return the gradients of all layers, contiguous and in their dtypes."""
        features, references = comparison.for_extension()
        outputs = [torch.empty(layer.shape, dtype=layer.dtype) for layer in features]
        _core.feature_distance_gradient(
            [view_of(layer) for layer in features],
            [view_of(reference) for reference in references],
            [of_layer.data_ptr() for of_layer in factors],
            [output.data_ptr() for output in outputs],
            gradient.item(),
            threads=threads(),
        )
        return [output.to(layer.dtype) for output, layer in zip(outputs, comparison.features, strict=True)]


def threads() -> int | None:
    """Return None if SAFELORA_FAST_NUM_THREADS is set, else at most the number of threads that torch uses."""
    if os.environ.get("SAFELORA_FAST_NUM_THREADS"):
        return None
    return min(_core.default_threads(), int(torch.get_num_threads()))
