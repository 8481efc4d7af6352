"""Feature distance on the CPU, by the extension module, on the tensors' own memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import torch

from safelora_fast import _core
from safelora_fast.ops.feature_distance.once import differentiable_once

if TYPE_CHECKING:
    from collections.abc import Sequence

    Spec = tuple[int, str, tuple[int, int, int], tuple[int, int]]

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def accepts(tensor: torch.Tensor) -> bool:
    """Whether the kernels can read a tensor: it must have memory of its own, which subclasses need not have."""
    plain = type(tensor) in {torch.Tensor, torch.nn.Parameter} and tensor.layout == torch.strided
    return bool(plain and tensor.device.type == "cpu" and tensor.dtype in DTYPES)


def feature_distance(
    features: Sequence[torch.Tensor],
    reference_features: Sequence[torch.Tensor],
    mask: torch.Tensor,
    normalize: Literal["sequence", "token", "none"],
    segments: torch.Tensor | None,
) -> torch.Tensor:
    """The distance; tensors whose hidden axis is contiguous are read in place, others are copied."""
    references = [reference.detach() for reference in reference_features]
    blocks = list(features)
    for index, (block, reference) in enumerate(zip(blocks, references, strict=True)):
        if block.dtype != reference.dtype:
            blocks[index], references[index] = block.float(), reference.float()
    distance: torch.Tensor = _Distance.apply(mask.cpu(), segments, normalize, *blocks, *references)
    return distance


class _Distance(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        mask: torch.Tensor,
        segments: torch.Tensor | None,
        normalize: Literal["sequence", "token", "none"],
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        count = len(tensors) // 2
        readable = [_readable(tensor) for tensor in tensors]
        specs = [_spec(tensor) for tensor in readable]
        # [blocks, batch, tokens, 2]: what the gradient of each token is made of
        factors = torch.empty((count, *mask.shape, 2), dtype=torch.float64)
        if segments is not None:
            segments = segments.to(device="cpu", dtype=torch.int64)
        distance = _core.feature_distance(
            specs[:count],
            specs[count:],
            (mask.data_ptr(), mask.stride()),
            None if segments is None else (segments.data_ptr(), segments.stride()),
            factors.data_ptr(),
            normalize=normalize,
            threads=_threads(),
        )
        ctx.save_for_backward(factors, *tensors)
        return torch.tensor(distance, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factors, *tensors = ctx.saved_tensors
        count = len(factors)
        wanted = [index for index in range(count) if ctx.needs_input_grad[3 + index]]
        inputs = [tensors[index] for index in wanted]
        blocks = [_readable(block) for block in inputs]
        references = [_readable(tensors[count + index]) for index in wanted]
        outputs = [torch.empty(block.shape, dtype=block.dtype) for block in blocks]
        _core.feature_distance_gradient(
            [_spec(block) for block in blocks],
            [_spec(reference) for reference in references],
            [factors[index].data_ptr() for index in wanted],
            [output.data_ptr() for output in outputs],
            gradient.item(),
            threads=_threads(),
        )
        result: list[torch.Tensor | None] = [None] * (3 + 2 * count)
        for index, output in zip(wanted, differentiable_once(outputs, [*inputs, gradient]), strict=True):
            result[3 + index] = output
        return tuple(result)


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
