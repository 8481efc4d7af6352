"""The feature distance's Triton kernels against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from feature_batches import assert_same_bits, batch, run, truth

from safelora_fast.errors import BackendError
from safelora_fast.ops import feature_distance

# The interpreter cuts bfloat16 off where a GPU rounds it.
ROUNDING = {torch.float32: 4e-7, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
DTYPES = pytest.mark.parametrize("dtype", list(ROUNDING), ids=["fp32", "fp16", "bf16"])
NORMALIZATIONS = pytest.mark.parametrize("normalize", ["sequence", "token", "none"])
SEGMENTS = pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])


def assert_true(ours, expected, mask):
    """The value to a few float32 roundings, gradients to the rounding of their dtype, zero where nothing counts."""
    assert ours[0].dtype == torch.float32
    assert ours[0].item() == pytest.approx(expected[0].item(), rel=1e-6, abs=1e-12)
    for left, right in zip(ours[1], expected[1], strict=True):
        assert (left.double() - right).norm() <= ROUNDING[left.dtype] * right.norm() + 2.0**-25 * left.numel() ** 0.5
        assert not left[~mask].any()


@DTYPES
@NORMALIZATIONS
@SEGMENTS
@pytest.mark.parametrize("shape", [(3, 11, 37), (2, 7, 1030), (1, 1, 2)], ids=str)
def test_value_and_gradients(dtype, normalize, packed, shape):
    features, reference, mask, segments = batch(dtype, shape, blocks=3)
    mask[0, 0] = True
    for block in (*features, *reference):
        block.data[0, 0] = block.data[0, 0].nan_to_num(0.5)
    segments = segments if packed else None
    ours = run(features, reference, mask, normalize, segments)
    assert ours[0] > 0
    assert_true(ours, truth(features, reference, mask, normalize, segments), mask)
    assert_same_bits(ours, run(features, reference, mask, normalize, segments))


@NORMALIZATIONS
@pytest.mark.parametrize("tokens", [130, 1500])
def test_sequences_over_many_tiles(normalize, tokens):
    """Numbers of a row may repeat after others; each tile of tokens starts in the middle of a sequence."""
    features, reference, mask, _ = batch(torch.float32, (2, tokens, 8), blocks=1)
    segments = (torch.arange(tokens) // 47 % 3).expand(2, tokens)
    assert_true(
        run(features, reference, mask, normalize, segments), truth(features, reference, mask, normalize, segments), mask
    )


@pytest.mark.parametrize("drift", [1e-1, 1e-3, 1e-5])
def test_no_cancellation_at_a_small_drift(drift):
    features, reference, mask, _ = batch(torch.float32, (2, 9, 256), drift=drift)
    ours, expected = run(features, reference, mask), truth(features, reference, mask)
    assert ours[0].item() == pytest.approx(expected[0].item(), rel=2e-6)
    for left, right in zip(ours[1], expected[1], strict=True):
        assert (left.double() - right).norm() < 2e-6 * right.norm()


class TestLayouts:
    """The strides of what hooks give: views of wider tensors, axes the other way, a hidden axis with gaps."""

    def check(self, relaid):
        features, reference, mask, segments = batch(torch.float32, (3, 8, 24))
        expected = truth(features, reference, mask, "sequence", segments)
        moved = [relaid(block.detach()).requires_grad_() for block in features]
        others = [relaid(block) for block in reference]
        ours = run(moved, others, mask, "sequence", segments)
        assert_true(ours, expected, mask)
        assert_true(run(moved, reference, mask, "sequence", segments), expected, mask)

    def test_tokens_first(self):
        self.check(lambda block: block.transpose(0, 1).contiguous().transpose(0, 1))

    def test_hidden_with_gaps(self):
        self.check(lambda block: torch.stack([block, torch.full_like(block, torch.nan)], -1)[..., 0])

    def test_hidden_first(self):
        self.check(lambda block: block.permute(2, 0, 1).contiguous().permute(1, 2, 0))

    def test_part_of_a_wider_tensor(self):
        wider = torch.nn.functional.pad
        self.check(lambda block: wider(block, (3, 5, 1, 2), value=torch.nan)[:, 1:-2, 3:-5])

    def test_one_row_for_all(self):
        self.check(lambda block: block)
        features, reference, mask, _ = batch(torch.float32, (3, 8, 24), poison=False)
        shared = [block[:1].expand(3, 8, 24) for block in reference]
        assert_true(run(features, shared, mask), truth(features, shared, mask), mask)

    def test_masks_and_segments_with_strides(self):
        features, reference, mask, segments = batch(torch.float32, (3, 8, 24))
        ours = run(features, reference, mask.T.contiguous().T, "sequence", segments.int().T.contiguous().T)
        assert_same_bits(ours, run(features, reference, mask, "sequence", segments))


def test_blocks_that_differ_take_a_launch_each():
    features, reference, mask, segments = batch(torch.float32, (2, 6, 20), blocks=4)
    narrow = batch(torch.bfloat16, (2, 6, 12), blocks=1)
    for tensors, (other,) in ((features, narrow[0]), (reference, narrow[1])):
        tensors.insert(1, torch.where(mask[..., None], other.detach().nan_to_num(0.25), torch.nan))
        tensors[3] = tensors[3].detach().half()
    features = [block.detach().requires_grad_() for block in features]
    for normalize in ("sequence", "token"):
        assert_true(
            run(features, reference, mask, normalize, segments),
            truth(features, reference, mask, normalize, segments),
            mask,
        )


@NORMALIZATIONS
def test_nothing_that_counts(normalize):
    features, reference, mask, segments = batch(torch.float32)
    mask[1] = False
    for block in (*features, *reference):
        block.data[1] = torch.nan
    assert_true(run(features, reference, mask, normalize), truth(features, reference, mask, normalize), mask)
    for numbers in (None, segments):
        value, gradients = run(features, reference, torch.zeros_like(mask), normalize, numbers)
        assert value == 0
        assert not any(gradient.any() for gradient in gradients)
    for shape in [(0, 4, 8), (2, 0, 8)]:
        empty = torch.zeros(shape, requires_grad=True)
        value, gradients = run([empty], [empty.detach()], torch.zeros(shape[:2], dtype=torch.bool), normalize)
        assert value == 0
        assert gradients[0].shape == shape


def test_zero_vectors_and_identical_ones():
    features, reference, mask, _ = batch(torch.float32, poison=False)
    value, gradients = run([block.detach().clone().requires_grad_() for block in reference], reference, mask)
    assert value == 0
    assert not any(gradient.any() for gradient in gradients)
    zero = [torch.zeros_like(block).requires_grad_() for block in features]
    value, gradients = run(zero, reference, mask, "token")
    assert value.item() == pytest.approx(len(zero) * mask.sum().item() / mask.any(1).sum().item())
    assert all(gradient.isfinite().all() for gradient in gradients)


@NORMALIZATIONS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_value_that_counts_shows(normalize, bad):
    for where in range(2):
        states = [torch.ones(2, 3, 5), torch.zeros(2, 3, 5)]
        states[where][1, 2, 4] = bad
        mask = torch.ones(2, 3, dtype=torch.bool)
        assert not feature_distance([states[0]], [states[1]], mask, normalize).isfinite()


def test_only_the_gradients_that_are_asked_for():
    features, reference, mask, _ = batch(torch.float32, blocks=3)
    expected = run(features, reference, mask)[1]
    features[1] = features[1].detach()
    value = feature_distance(features, reference, mask)
    first, last = torch.autograd.grad(value, [features[0], features[2]])
    assert torch.equal(first, (expected[0] / 0.3)) or torch.allclose(first, expected[0] / 0.3, rtol=1e-6)
    assert torch.allclose(last, expected[2] / 0.3, rtol=1e-6)


def test_what_it_refuses():
    features, reference, mask, _ = batch(torch.float64, poison=False)
    with pytest.raises(BackendError, match="cannot serve feature_distance: a tensor is float64"):
        feature_distance(features, reference, mask)
