"""Batches of hidden states with NaN at masked tokens, the plain definition of the distance, and comparisons with it."""

from __future__ import annotations

import pytest
import torch

from safelora_fast.ops import feature_distance


def definition(features, references, mask, normalize="sequence", segments=None):
    """Return the sum over layers and mean over sequences of ‖x − x₀‖², computed in plain loops."""
    total, sequences = features[0].sum() * 0.0, 0
    for row in range(mask.shape[0]):
        numbers = torch.zeros_like(mask[row], dtype=torch.long) if segments is None else segments[row]
        for number in numbers[mask[row]].unique():
            chosen = mask[row] & (numbers == number)
            sequences += 1
            for layer, reference in zip(features, references, strict=True):
                x, y = layer[row][chosen], reference[row][chosen]
                if normalize == "sequence":
                    x, y = x / x.norm(), y / y.norm()
                elif normalize == "token":
                    x, y = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
                total = total + (x - y).square().sum()
    return total / max(sequences, 1)


def batch(dtype, shape=(3, 11, 37), *, drift=0.1, layers=2, poison=True, seed=0, device="cpu"):
    """Return features, references, mask and segments. Masked tokens hold NaN; the first token is never masked."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape[:2], generator=generator) < 0.7
    mask[:1, :1] = True
    segments = torch.randint(-2, 2, shape[:2], generator=generator)
    references = [torch.randn(shape, generator=generator) for _ in range(layers)]
    features = [tensor + drift * torch.randn(shape, generator=generator) for tensor in references]
    for tensor in (*features, *references):
        if poison:
            tensor[~mask] = torch.nan
    features = [f.to(device, dtype).requires_grad_() for f in features]
    return features, [r.to(device, dtype) for r in references], mask.to(device), segments.to(device)


def run(features, references, mask, normalize="sequence", segments=None, *, op=feature_distance):
    """Return the value and the gradients of a weighted loss."""
    value = op(features, references, mask, normalize, segments)
    return value.detach(), torch.autograd.grad(0.3 * value, features)


def truth(features, references, mask, normalize="sequence", segments=None):
    """Return the same from the definition in float64, with the NaN replaced."""
    exact = [torch.where(mask[..., None], f.detach().double(), 1.0).requires_grad_() for f in features]
    others = [
        torch.where(mask[..., None], r.to(f.device).double(), 1.0) for f, r in zip(exact, references, strict=True)
    ]
    return run(exact, others, mask, normalize, segments, op=definition)


def assert_true(ours, expected, mask, *, value=1e-6, rounding=4e-7):
    """Check the value and the gradients to the rounding of their dtypes, and that masked gradients are zero."""
    assert ours[0].item() == pytest.approx(expected[0].item(), rel=value, abs=1e-12)
    # The interpreter truncates to bfloat16, while a GPU rounds.
    roundings = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
    for left, right in zip(ours[1], expected[1], strict=True):
        allowed = roundings.get(left.dtype, rounding)
        assert (left.double() - right).norm() <= allowed * right.norm() + 2.0**-25 * left.numel() ** 0.5
        assert not left[~mask].any()


def assert_same_bits(ours, theirs):
    for left, right in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
        assert torch.equal(left.flatten().view(torch.uint8), right.flatten().view(torch.uint8))
