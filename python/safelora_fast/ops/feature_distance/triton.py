"""Feature distance by Triton: one launch reads all blocks, one more writes all gradients, small ones add up between."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.ops import triton_runtime
from safelora_fast.ops.triton_runtime import refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safelora_fast.ops.feature_distance.arguments import Comparison

__all__ = ["backward", "forward", "refusal"]

TOKENS, COLUMNS = 4, 512  # the tile of the kernels that read hidden states: 16 elements a thread and tensor
TOKEN_TILE = 1024  # of those that read one number a token
BOUNDS_TILE = 64


def forward(comparison: Comparison) -> tuple[torch.Tensor, torch.Tensor]:
    """The distance and the factors; nothing waits for the GPU."""
    value = torch.zeros((), dtype=torch.float32, device=comparison.device)
    factors = comparison.empty_factors()
    if not comparison.mask.numel():
        return value, factors
    if comparison.segments is not None:
        factors.zero_()  # the kernels write those of a sequence, and a token that does not count is in none
    sequences = None
    for launch in _launches(comparison):
        tokens = _Tokens(comparison, launch.device)
        with triton_runtime.on(launch.device):
            part = factors if launch.is_all else torch.zeros_like(factors[: len(launch.blocks)], device=launch.device)
            distances = tokens.factors(launch.sums(tokens), part)
            total = distances.sum(dtype=_exact(launch.device))
        if not launch.is_all:
            factors[launch.blocks] = part.to(factors.device)
        if sequences is None:
            sequences = tokens.sequences().to(value.device)
        value += (total.to(value.device) / sequences.clamp(min=1)).to(value.dtype)
    assert sequences is not None  # noqa: S101
    factors /= sequences.clamp(min=1)
    return value, factors


def backward(comparison: Comparison, factors: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of all blocks, contiguous and in their dtypes."""
    outputs = [torch.empty(block.shape, dtype=block.dtype, device=block.device) for block in comparison.features]
    if not comparison.mask.numel():
        return outputs
    for launch in _launches(comparison):
        part = factors if launch.is_all else factors[launch.blocks].to(launch.device)
        with triton_runtime.on(launch.device):
            launch.gradients(part, gradient.to(launch.device), [outputs[index] for index in launch.blocks])
    return outputs


class _Launch:
    """Blocks that one launch can serve: of one device, hidden size, strides and dtypes; as a rule all of them."""

    def __init__(self, comparison: Comparison, blocks: list[int]) -> None:
        self.blocks = blocks
        self.is_all = len(blocks) == len(comparison.features)
        self._features = tuple(comparison.features[index].detach() for index in blocks)
        self.device = self._features[0].device
        self._references = tuple(comparison.references[index].detach().to(self.device) for index in blocks)
        self._shape = self._features[0].shape
        self._strides = self._features[0].stride(), self._references[0].stride()

    def sums(self, tokens: _Tokens) -> torch.Tensor:
        """‖d‖², ⟨d, h₀⟩ and ‖h₀‖² [3, blocks, batch, tokens] of the tokens that count."""
        from safelora_fast.ops.feature_distance import triton_kernels

        sums = torch.empty((3, len(self.blocks), *self._shape[:2]), dtype=torch.float32, device=self.device)
        triton_kernels.token_sums[self._grid()](
            self._features,
            self._references,
            tokens.mask,
            sums,
            *self._shape,
            *self._strides,
            tokens.mask.stride(),
            **self._tile(),
            **triton_runtime.OPTIONS,
        )
        return sums

    def gradients(self, factors: torch.Tensor, weight: torch.Tensor, outputs: list[torch.Tensor]) -> None:
        """Write every block's gradient."""
        from safelora_fast.ops.feature_distance import triton_kernels

        triton_kernels.gradients[self._grid()](
            self._features,
            self._references,
            factors,
            weight,
            tuple(outputs),
            *self._shape,
            *self._strides,
            **self._tile(),
            **triton_runtime.OPTIONS,
        )

    def _grid(self) -> tuple[int, int]:
        return _tiles(self._shape[0] * self._shape[1], TOKENS), len(self.blocks)

    def _tile(self) -> dict[str, int]:
        return {"TOKENS": TOKENS, "COLUMNS": min(_power_of_two(self._shape[2]), COLUMNS)}


class _Tokens:
    """The tokens that count and the sequences that they are in, on one device."""

    def __init__(self, comparison: Comparison, device: torch.device) -> None:
        self._normalize = comparison.normalize
        self.mask = comparison.mask.to(device)
        self._rows, self._tokens = self.mask.shape
        self._bounds: tuple[torch.Tensor, torch.Tensor] | None = None
        if comparison.segments is not None:
            with triton_runtime.on(device):
                self._bounds = self._sequence_bounds(comparison.segments.to(device))

    def sequences(self) -> torch.Tensor:
        """Number of sequences with a token that counts."""
        if self._bounds is None:
            return self.mask.any(1).sum()
        return (self._bounds[0] == torch.arange(self._tokens, device=self.mask.device)).sum()

    def factors(self, sums: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Write the factors of one launch's blocks; returns distances, whose sum is what counts."""
        from safelora_fast.ops.feature_distance import triton_kernels

        settings: dict[str, Any] = {"EXACT": _triton_type(_exact(sums.device)), "TILE": self._tile(TOKEN_TILE)}
        packed = self._bounds is not None and self._normalize == "sequence"
        slots = 1 if self._normalize == "sequence" and not packed else self._tokens
        blocks = len(factors)
        distances = torch.empty((blocks, self._rows, slots), dtype=_exact(sums.device), device=sums.device)
        if self._normalize == "sequence":
            first, last = self._bounds or (sums, sums)
            triton_kernels.sequence_factors[slots, self._rows, blocks](
                sums, self.mask, first, last, distances, factors, self._rows, self._tokens, self.mask.stride(),
                PACKED=packed, **settings, **triton_runtime.OPTIONS,
            )  # fmt: skip
        else:
            triton_kernels.token_factors[_tiles(self._tokens, settings["TILE"]), self._rows, blocks](
                sums, self.mask, distances, factors, self._rows, self._tokens, self.mask.stride(),
                UNIT=self._normalize == "token", **settings, **triton_runtime.OPTIONS,
            )  # fmt: skip
        return distances

    def _sequence_bounds(self, segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from safelora_fast.ops.feature_distance import triton_kernels

        first, last = torch.empty((2, *self.mask.shape), dtype=torch.int32, device=self.mask.device)
        tile = self._tile(BOUNDS_TILE)
        triton_kernels.sequence_bounds[_tiles(self._tokens, tile), self._rows](
            self.mask, segments, first, last, self._tokens, self.mask.stride(), segments.stride(), TILE=tile,
            **triton_runtime.OPTIONS,
        )  # fmt: skip
        return first, last

    def _tile(self, most: int) -> int:
        return min(_power_of_two(self._tokens), most)


def _launches(comparison: Comparison) -> Iterator[_Launch]:
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, (block, reference) in enumerate(zip(comparison.features, comparison.references, strict=True)):
        key = (block.device, block.shape, block.dtype, reference.dtype, block.stride(), reference.stride())
        alike[key].append(index)
    return (_Launch(comparison, blocks) for blocks in alike.values())


def _exact(device: torch.device) -> torch.dtype:
    """What sums over tokens are kept in: Intel's GPUs need not have float64."""
    return torch.float32 if device.type == "xpu" else torch.float64


def _triton_type(dtype: torch.dtype) -> Any:
    from triton import language

    return {torch.float32: language.float32, torch.float64: language.float64}[dtype]


def _tiles(count: int, tile: int) -> int:
    return -(-count // tile)


def _power_of_two(count: int) -> int:
    return max(1 << (count - 1).bit_length(), 2)
