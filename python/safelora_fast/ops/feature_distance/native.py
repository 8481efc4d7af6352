"""Feature distance on the CPU, by the extension module, on the tensors' own memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from safelora_fast import _core

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.ops.feature_distance.arguments import Comparison

    Spec = tuple[int, str, tuple[int, int, int], tuple[int, int]]

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def refusal(tensors: Sequence[torch.Tensor]) -> str | None:
    """Why the kernels cannot read these tensors, or None: each must have memory of its own, which subclasses need not have."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"a tensor is {str(tensor.dtype).removeprefix('torch.')}"
        if type(tensor) not in {torch.Tensor, torch.nn.Parameter} or tensor.layout != torch.strided:
            return f"a {type(tensor).__name__} need not have memory of its own"
    return None


def forward(comparison: Comparison) -> tuple[torch.Tensor, torch.Tensor]:
    """The distance and the factors; tensors whose hidden axis is contiguous are read in place, others are copied."""
    blocks, references = _pairs(comparison)
    factors = comparison.empty_factors()
    mask, segments = comparison.mask.cpu(), comparison.segments
    if segments is not None:
        segments = segments.to(device="cpu", dtype=torch.int64)
    distance = _core.feature_distance(
        [_spec(block) for block in blocks],
        [_spec(reference) for reference in references],
        (mask.data_ptr(), mask.stride()),
        None if segments is None else (segments.data_ptr(), segments.stride()),
        factors.data_ptr(),
        normalize=comparison.normalize,
        threads=_threads(),
    )
    return torch.tensor(distance, dtype=torch.float32), factors


def backward(comparison: Comparison, factors: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of all blocks, contiguous and in their dtypes."""
    blocks, references = _pairs(comparison)
    outputs = [torch.empty(block.shape, dtype=block.dtype) for block in blocks]
    _core.feature_distance_gradient(
        [_spec(block) for block in blocks],
        [_spec(reference) for reference in references],
        [of_block.data_ptr() for of_block in factors],
        [output.data_ptr() for output in outputs],
        gradient.item(),
        threads=_threads(),
    )
    return [output.to(block.dtype) for output, block in zip(outputs, comparison.features, strict=True)]


def _pairs(comparison: Comparison) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Blocks and references as the kernels read them: of one dtype."""
    blocks, references = [], []
    for block, reference in zip(comparison.features, comparison.references, strict=True):
        alike = block.dtype == reference.dtype
        blocks.append(_readable(block if alike else block.float()))
        references.append(_readable(reference if alike else reference.float()))
    return blocks, references


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its hidden axis is contiguous, else a copy."""
    return tensor if tensor.stride(2) == 1 or tensor.shape[2] == 1 else tensor.contiguous()


def _spec(tensor: torch.Tensor) -> Spec:
    return tensor.data_ptr(), DTYPES[tensor.dtype], tuple(tensor.shape), tensor.stride()[:2]


def _threads() -> int | None:
    """What the package's variable says, or else no more than torch uses: processes that share a machine set that."""
    if os.environ.get("SAFELORA_FAST_NUM_THREADS"):
        return None
    return min(_core.default_threads(), int(torch.get_num_threads()))
