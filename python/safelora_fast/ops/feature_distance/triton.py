"""Feature distance by Triton: one launch reads all layers, small ones add up, one writes all gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.ops import triton_runtime
from safelora_fast.ops.triton_runtime import power_of_two, tiles

if TYPE_CHECKING:
    from collections.abc import Hashable

    from safelora_fast.ops.feature_distance.torch_impl import Comparison

TOKENS, COLUMNS = 4, 512  # tile of the kernels that read hidden states: 16 elements per thread and tensor
TOKEN_TILE = 1024  # tile of the kernels that read one number per token
BOUNDS_TILE = 64


class Backend(triton_runtime.TritonBackend):
    """Never waits for the GPU."""

    def forward(self, comparison: Comparison) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the distance and the factors."""
        value = torch.zeros((), dtype=torch.float32, device=comparison.device)
        factors = comparison.empty_factors()
        if not comparison.mask.numel():
            return value, factors
        if comparison.segments is not None:
            factors.zero_()  # the kernels write only tokens that belong to a sequence
        count = None
        for layers in comparison.groups(_alike):
            launch = _Launch(comparison.only(layers))
            with triton_runtime.on(launch.device):
                is_all = len(layers) == len(factors)
                part = factors if is_all else torch.zeros_like(factors[: len(layers)], device=launch.device)
                total = launch.factors(part).sum(dtype=launch.exact)
            for index, of_layer in zip(layers, () if is_all else part, strict=not is_all):
                factors[index].copy_(of_layer)  # one by one: indexing with a list would copy it to the device and wait
            if count is None:
                count = launch.sequences().to(value.device).clamp(min=1)
            value += (total.to(value.device) / count).to(value.dtype)
        factors /= count
        return value, factors

    def backward(self, comparison: Comparison, factors: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
        """Return the gradients of all layers, contiguous and in their dtypes."""
        outputs = [torch.empty(layer.shape, dtype=layer.dtype, device=layer.device) for layer in comparison.features]
        if not comparison.mask.numel():
            return outputs
        for layers in comparison.groups(_alike):
            launch = _Launch(comparison.only(layers))
            is_all = len(layers) == len(factors)
            part = factors if is_all else torch.stack([factors[index] for index in layers]).to(launch.device)
            with triton_runtime.on(launch.device):
                launch.gradients(part, gradient.to(launch.device), [outputs[index] for index in layers])
        return outputs


def _alike(layer: torch.Tensor, reference: torch.Tensor) -> Hashable:
    """What layers must share to be in one launch; usually all do."""
    return layer.device, layer.shape, layer.dtype, reference.dtype, layer.stride(), reference.stride()


class _Launch:
    """Launches for layers with the same device, hidden size, strides and dtypes."""

    def __init__(self, comparison: Comparison) -> None:
        self.device = comparison.device
        self.exact = torch.float32 if self.device.type == "xpu" else torch.float64  # Intel's GPUs may lack float64
        self._states = tuple(comparison.features), tuple(comparison.references)
        self._shape = self._states[0][0].shape
        self._strides = self._states[0][0].stride(), self._states[1][0].stride()
        self._mask, self._normalize, self._segments = comparison.mask, comparison.normalize, comparison.segments
        self._rows, self._tokens = self._mask.shape
        self._bounds: tuple[torch.Tensor, torch.Tensor] | None = None

    def sequences(self) -> torch.Tensor:
        """Return the number of sequences with a token that counts. Call after `factors`."""
        if self._bounds is None:
            return self._mask.any(1).sum()
        return (self._bounds[0] == torch.arange(self._tokens, device=self.device)).sum()

    def factors(self, factors: torch.Tensor) -> torch.Tensor:
        """Write the factors of the layers and return distances; their sum is the result."""
        from safelora_fast.ops.feature_distance import triton_kernels

        if self._segments is not None:
            self._bounds = self._sequence_bounds(self._segments)
        sums, layers = self._sums(), len(factors)
        settings: dict[str, Any] = {"EXACT": triton_runtime.dtype(self.exact), "TILE": TOKEN_TILE}
        packed = self._bounds is not None and self._normalize == "sequence"
        slots = 1 if self._normalize == "sequence" and not packed else self._tokens
        distances = torch.empty((layers, self._rows, slots), dtype=self.exact, device=self.device)
        if self._normalize == "sequence":
            first, last = self._bounds or (sums, sums)
            triton_kernels.sequence_factors[slots, self._rows, layers](
                sums, self._mask, first, last, distances, factors, self._rows, self._tokens, *self._mask.stride(),
                PACKED=packed, **settings, **triton_runtime.OPTIONS,
            )  # fmt: skip
        else:
            triton_kernels.token_factors[tiles(self._tokens, settings["TILE"]), self._rows, layers](
                sums, self._mask, distances, factors, self._rows, self._tokens, *self._mask.stride(),
                UNIT=self._normalize == "token", **settings, **triton_runtime.OPTIONS,
            )  # fmt: skip
        return distances

    def gradients(self, factors: torch.Tensor, weight: torch.Tensor, outputs: list[torch.Tensor]) -> None:
        """Write every layer's gradient."""
        from safelora_fast.ops.feature_distance import triton_kernels

        triton_kernels.gradients[self._grid()](
            *self._states, factors, weight, tuple(outputs), *self._shape, *self._strides,
            **self._state_tile(), **triton_runtime.OPTIONS,
        )  # fmt: skip

    def _sums(self) -> torch.Tensor:
        """‖d‖², ⟨d, h₀⟩ and ‖h₀‖² of the tokens that count: [3, layers, batch, tokens]."""
        from safelora_fast.ops.feature_distance import triton_kernels

        shape = (3, len(self._states[0]), self._rows, self._tokens)
        sums = torch.empty(shape, dtype=torch.float32, device=self.device)
        triton_kernels.token_sums[self._grid()](
            *self._states, self._mask, sums, *self._shape, *self._strides, *self._mask.stride(),
            **self._state_tile(), **triton_runtime.OPTIONS,
        )  # fmt: skip
        return sums

    def _sequence_bounds(self, segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from safelora_fast.ops.feature_distance import triton_kernels

        # Each with memory of its own: a kernel is compiled for the alignment of its operands.
        first, last = (torch.empty(self._mask.shape, dtype=torch.int32, device=self.device) for _ in range(2))
        triton_kernels.sequence_bounds[tiles(self._tokens, BOUNDS_TILE), self._rows](
            self._mask, segments, first, last, self._tokens, *self._mask.stride(), *segments.stride(), TILE=BOUNDS_TILE,
            **triton_runtime.OPTIONS,
        )  # fmt: skip
        return first, last

    def _grid(self) -> tuple[int, int]:
        return tiles(self._rows * self._tokens, TOKENS), len(self._states[0])

    def _state_tile(self) -> dict[str, int]:
        return {"TOKENS": TOKENS, "COLUMNS": min(power_of_two(self._shape[2]), COLUMNS)}
