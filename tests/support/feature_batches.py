"""Batches of hidden states with poison where nothing counts, and the truth about them."""

from __future__ import annotations

import torch

from safelora_fast.ops.feature_distance import feature_distance, feature_distance_reference


def batch(dtype, shape=(3, 11, 37), *, drift=0.1, blocks=2, poison=True, seed=0):
    """Features, reference, mask and segments; tokens that do not count hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape[:2], generator=generator) < 0.7
    segments = torch.randint(-2, 2, shape[:2], generator=generator)
    reference = [torch.randn(shape, generator=generator) for _ in range(blocks)]
    features = [tensor + drift * torch.randn(shape, generator=generator) for tensor in reference]
    for tensor in (*features, *reference):
        if poison:
            tensor[~mask] = torch.nan
    return [f.to(dtype).requires_grad_() for f in features], [r.to(dtype) for r in reference], mask, segments


def run(features, reference, mask, normalize="sequence", segments=None, *, op=feature_distance):
    """Value and gradients of a weighted loss."""
    value = op(features, reference, mask, normalize, segments)
    return value.detach(), torch.autograd.grad(0.3 * value, features)


def truth(features, reference, mask, normalize="sequence", segments=None):
    """The same of the definition in float64, which may not see the poison."""
    exact = [torch.where(mask[..., None], f.detach().double(), 1.0).requires_grad_() for f in features]
    others = [torch.where(mask[..., None], r.double(), 1.0) for r in reference]
    return run(exact, others, mask, normalize, segments, op=feature_distance_reference)


def bits(tensor):
    return tensor.flatten().view(torch.uint8)


def assert_same_bits(ours, theirs):
    assert torch.equal(bits(ours[0]), bits(theirs[0]))
    for left, right in zip(ours[1], theirs[1], strict=True):
        assert torch.equal(bits(left), bits(right))
