"""Feature distance on NVIDIA GPUs, by the extension module, on the tensors' own memory and torch's current stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safelora_fast.ops import cuda_runtime
from safelora_fast.ops.feature_distance.packing import pack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.ops.feature_distance.arguments import Comparison

    Spec = tuple[int, str, tuple[int, int, int], tuple[int, int]]

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def refusal(tensors: Sequence[torch.Tensor]) -> str | None:
    """Why the kernels cannot serve these tensors, in a line, or None."""
    return cuda_runtime.refusal(tensors, tuple(DTYPES))


def forward(comparison: Comparison) -> tuple[torch.Tensor, torch.Tensor]:
    """The distance and the factors; tensors whose hidden axis is contiguous are read in place, others are copied.

    Nothing waits for the device, and a CUDA graph can capture it. The blocks of a model that is spread over several
    devices are read where they lie.
    """
    groups = _by_device(comparison)
    if len(groups) == 1:
        return _forward(comparison)
    parts = [_forward(comparison.only(blocks)) for blocks in groups]
    factors = torch.empty((len(comparison.features), *parts[0][1].shape[1:]), device=comparison.device)
    for blocks, (_, part) in zip(groups, parts, strict=True):
        factors[blocks] = part.to(factors.device)
    return torch.stack([value.to(factors.device) for value, _ in parts]).sum(), factors


def backward(comparison: Comparison, factors: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of all blocks, contiguous and in their dtypes."""
    outputs: dict[int, torch.Tensor] = {}
    for blocks in _by_device(comparison):
        group = comparison.only(blocks)
        device = group.device
        part = factors if len(blocks) == len(factors) else factors[blocks]
        part, weight = part.to(device).contiguous(), gradient.to(device=device, dtype=torch.float32)
        features, references = _pairs(group)
        written = [torch.empty(block.shape, dtype=block.dtype, device=device) for block in features]
        cuda_runtime.runtime().feature_distance_gradient(
            cuda_runtime.place(device),
            [_spec(block) for block in features],
            [_spec(reference) for reference in references],
            [output.data_ptr() for output in written],
            part.data_ptr(),
            weight.data_ptr(),
        )
        for index, output in zip(blocks, written, strict=True):
            outputs[index] = output.to(comparison.features[index].dtype)
    return [outputs[index] for index in range(len(outputs))]


def _forward(comparison: Comparison) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for blocks on one device."""
    features, references = _pairs(comparison)
    device, mask = comparison.device, comparison.mask.to(comparison.device)
    packing = None
    if comparison.segments is not None:
        packing = pack(mask, comparison.segments.to(device=device, dtype=torch.int64))
    count, batch, tokens = len(features), len(mask), mask.numel()
    factors = torch.empty((count, *mask.shape, 2), dtype=torch.float32, device=device)
    sums = torch.empty(count * (tokens * 3 + batch), dtype=torch.float64, device=device)
    sequences = torch.empty(batch, dtype=torch.int32, device=device)
    value, share = torch.empty(2, dtype=torch.float32, device=device).unbind()
    cuda_runtime.runtime().feature_distance(
        cuda_runtime.place(device),
        [_spec(block) for block in features],
        [_spec(reference) for reference in references],
        (mask.data_ptr(), mask.stride()),
        None if packing is None else (packing[0].data_ptr(), packing[1].data_ptr(), packing[2].data_ptr()),
        (
            sums.data_ptr(),
            factors.data_ptr(),
            sums[count * tokens * 3 :].data_ptr(),
            sequences.data_ptr(),
            share.data_ptr(),
            value.data_ptr(),
        ),
        normalize=comparison.normalize,
    )
    return value, factors.mul_(share)


def _by_device(comparison: Comparison) -> list[list[int]]:
    """The blocks of each device, that of the first block first."""
    groups: dict[torch.device, list[int]] = {}
    for index, block in enumerate(comparison.features):
        groups.setdefault(block.device, []).append(index)
    return list(groups.values())


def _pairs(comparison: Comparison) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Blocks and references as the kernels read them: on one device and of one dtype."""
    blocks, references = [], []
    for block, given in zip(comparison.features, comparison.references, strict=True):
        reference = given.to(block.device)
        alike = block.dtype == reference.dtype
        blocks.append(_readable(block if alike else block.float()))
        references.append(_readable(reference if alike else reference.float()))
    return blocks, references


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its hidden axis is contiguous, else a copy."""
    return tensor if tensor.stride(2) == 1 or tensor.shape[2] == 1 else tensor.contiguous()


def _spec(tensor: torch.Tensor) -> Spec:
    return tensor.data_ptr(), DTYPES[tensor.dtype], tuple(tensor.shape), tensor.stride()[:2]
