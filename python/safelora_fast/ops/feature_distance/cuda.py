"""Feature distance on NVIDIA GPUs, by the extension module, in the tensors' own memory on torch's current stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safelora_fast.ops import cuda_runtime
from safelora_fast.ops.feature_distance.torch_impl import view_of

if TYPE_CHECKING:
    from safelora_fast.ops.feature_distance.torch_impl import Comparison


class Backend(cuda_runtime.CudaBackend):
    """Reads tensors with a contiguous hidden axis in place, and copies others.

    Never waits for the device, so a CUDA graph can capture it. If a model is spread over several devices, each layer is
    read on its own device.
    """

    def forward(self, comparison: Comparison) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the distance and the factors."""
        parts, factors = [], comparison.empty_factors().to(torch.float32)
        for layers in comparison.groups(_device):
            value, part = _forward(comparison.only(layers))
            parts.append(value.to(factors.device))
            if len(layers) == len(factors):
                return value, part
            for index, of_layer in zip(layers, part, strict=True):
                factors[index].copy_(of_layer)
        return torch.stack(parts).sum(), factors

    def backward(self, comparison: Comparison, factors: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
        """Return the gradients of all layers, contiguous and in their dtypes."""
        outputs: dict[int, torch.Tensor] = {}
        for layers in comparison.groups(_device):
            group = comparison.only(layers)
            part = factors if len(layers) == len(factors) else torch.stack([factors[index] for index in layers])
            part, weight = part.to(group.device).contiguous(), gradient.to(device=group.device, dtype=torch.float32)
            features, references = group.for_extension()
            written = [torch.empty(layer.shape, dtype=layer.dtype, device=layer.device) for layer in features]
            cuda_runtime.runtime().feature_distance_gradient(
                cuda_runtime.place(group.device),
                [view_of(layer) for layer in features],
                [view_of(reference) for reference in references],
                [output.data_ptr() for output in written],
                part.data_ptr(),
                weight.data_ptr(),
            )
            for index, output in zip(layers, written, strict=True):
                outputs[index] = output.to(comparison.features[index].dtype)
        return [outputs[index] for index in range(len(outputs))]


def _forward(comparison: Comparison) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` for layers on one device."""
    features, references = comparison.for_extension()
    device, mask = comparison.device, comparison.mask
    packing = None if comparison.segments is None else pack(mask, comparison.segments.to(torch.int64))
    count, batch, tokens = len(features), len(mask), mask.numel()
    factors = torch.empty((count, *mask.shape, 2), dtype=torch.float32, device=device)
    sums = torch.empty(count * (tokens * 3 + batch), dtype=torch.float64, device=device)
    sequences = torch.empty(batch, dtype=torch.int32, device=device)
    value, share = torch.empty(2, dtype=torch.float32, device=device).unbind()
    cuda_runtime.runtime().feature_distance(
        cuda_runtime.place(device),
        [view_of(layer) for layer in features],
        [view_of(reference) for reference in references],
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


def pack(mask: torch.Tensor, segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the tokens of every batch row by segment, on their device and without waiting for it.

    Args:
        mask: [batch, tokens] bool, the tokens that count.
        segments: [batch, tokens] int64; tokens of one batch row with the same number are one sequence.

    Returns:
        order [batch, tokens]: the tokens of each row, sequence after sequence in their original order, then the tokens
        that do not count; starts [batch, tokens + 1]: where each sequence starts in it, then where the last one ends;
        counts [batch]: number of sequences. All int32 and contiguous.
    """
    batch, tokens = mask.shape
    by_segment = segments.argsort(dim=1, stable=True)
    order = by_segment.gather(1, (~mask).gather(1, by_segment).to(torch.uint8).argsort(dim=1, stable=True))
    counted, sorted_segments = mask.gather(1, order), segments.gather(1, order)
    first = counted.clone()
    first[:, 1:] &= sorted_segments[:, 1:] != sorted_segments[:, :-1]
    starts = counted.sum(1, keepdim=True).repeat(1, tokens + 2)  # the last column absorbs tokens that start no sequence
    positions = torch.arange(tokens, device=mask.device).expand(batch, tokens)
    starts.scatter_(1, torch.where(first, first.cumsum(1) - 1, tokens + 1), positions)
    return order.int().contiguous(), starts[:, : tokens + 1].int().contiguous(), first.sum(1).int()


def _device(layer: torch.Tensor, _: torch.Tensor) -> torch.device:
    return layer.device
