from __future__ import annotations

import pytest
import torch

from safelora_fast.ops.feature_distance import feature_distance, feature_distance_reference

SEGMENTS = torch.tensor([[5, 5, 5, 7, 7, 7, 7], [0, 0, 1, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3, 3]])
MASK = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)


def states(dtype, drift=0.3, hidden=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    reference = [torch.randn(3, 7, hidden, generator=generator, dtype=torch.float64) for _ in range(2)]
    moved = [block + drift * torch.randn(block.shape, generator=generator, dtype=torch.float64) for block in reference]
    return [b.to(dtype).requires_grad_() for b in moved], [b.to(dtype) for b in reference]


@pytest.mark.parametrize("normalize", ["sequence", "token", "none"])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["rows", "packed"])
class TestAgainstTheDefinition:
    def test_value_and_gradient(self, normalize, segments):
        features, reference = states(torch.float64)
        value = feature_distance(features, reference, MASK, normalize, segments)
        expected = feature_distance_reference(features, reference, MASK, normalize, segments)
        assert value.item() == pytest.approx(expected.item(), rel=1e-12)
        ours, theirs = torch.autograd.grad(value, features), torch.autograd.grad(expected, features)
        for left, right in zip(ours, theirs, strict=True):
            assert right.norm() > 0.01
            assert (left - right).norm() < 1e-12 * right.norm()
            assert not left[~MASK].any()

    def test_gradcheck(self, normalize, segments):
        features, reference = states(torch.float64)
        assert torch.autograd.gradcheck(
            lambda *f: 3 * feature_distance(f, reference, MASK, normalize, segments), tuple(features)
        )

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-7), (torch.bfloat16, 5e-3)])
    def test_low_precision(self, normalize, segments, dtype, tolerance):
        """Against float64 on the same rounded input; only the written gradient is rounded to bfloat16."""
        features, reference = states(dtype, hidden=33)
        exact = [f.detach().double().requires_grad_() for f in features]
        value = feature_distance(features, reference, MASK, normalize, segments)
        expected = feature_distance_reference(exact, [r.double() for r in reference], MASK, normalize, segments)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        pairs = zip(torch.autograd.grad(value, features), torch.autograd.grad(expected, exact), strict=True)
        for left, right in pairs:
            assert left.dtype == dtype
            assert (left.double() - right).norm() < tolerance * right.norm()


@pytest.mark.parametrize("drift", [1e-1, 1e-3, 1e-5])
def test_no_cancellation_at_a_small_drift(drift):
    """In float32, 2 − 2⟨x, x₀⟩ is 73 % off at a relative drift of 1e-3."""
    features, reference = states(torch.float32, drift=drift, hidden=64)
    expected = feature_distance_reference(
        [f.double() for f in features], [r.double() for r in reference], MASK, "sequence", SEGMENTS
    )
    assert feature_distance(features, reference, MASK, "sequence", SEGMENTS).item() == pytest.approx(
        expected.item(), rel=3e-6
    )


def test_padding_may_hold_anything():
    features, reference = states(torch.float32)
    expected = feature_distance(features, reference, MASK).item()
    for block in [*features, *reference]:
        block.data[~MASK] = 1e30
    assert feature_distance(features, reference, MASK).item() == expected


def test_identical_zero_and_empty():
    features, reference = states(torch.float32, drift=0.0)
    value = feature_distance(features, reference, MASK)
    assert value.item() == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(value, features))
    zero = [torch.zeros_like(f, requires_grad=True) for f in features]
    value = feature_distance(zero, reference, MASK, "token")
    assert value.item() == pytest.approx(2 * MASK.sum().item() / 2)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, zero))
    value = feature_distance(features, reference, torch.zeros_like(MASK))
    assert value.item() == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(value, features))


def test_refusals():
    features, reference = states(torch.float32)
    with pytest.raises(ValueError, match="normalize"):
        feature_distance(features, reference, MASK, "rows")
    with pytest.raises(ValueError, match="disagree"):
        feature_distance(features, reference, MASK[:2])
    with pytest.raises(ValueError, match="blocks"):
        feature_distance(features, reference[:1], MASK)
