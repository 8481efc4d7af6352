from __future__ import annotations

import pytest
import torch
from feature_batches import assert_same_bits, batch, run, truth

from safelora_fast.ops import feature_distance

ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SHAPES = [(3, 11, 37), (2, 300, 1024), (2, 260, 3584), (1, 1, 2)]


@pytest.fixture(autouse=True)
def is_served(served):
    served("feature_distance")


def on(device, features, reference, mask, segments):
    features = [block.detach().to(device).requires_grad_() for block in features]
    return features, [block.to(device) for block in reference], mask.to(device), segments.to(device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("normalize", ["sequence", "token", "none"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_against_float64_twice(device, shape, dtype, normalize, packed):
    given = batch(dtype, shape, blocks=3)
    given[2][0, 0] = True
    for block in (*given[0], *given[1]):
        block.data[0, 0] = block.data[0, 0].nan_to_num(0.5)
    features, reference, mask, segments = on(device, *given)
    segments = segments if packed else None
    ours = run(features, reference, mask, normalize, segments)
    expected = truth(features, reference, mask, normalize, segments)
    assert ours[0].item() == pytest.approx(expected[0].item(), rel=2e-6, abs=1e-12)
    for left, right in zip(ours[1], expected[1], strict=True):
        assert (left.double() - right).norm() <= ROUNDING[dtype] * right.norm() + 2.0**-25 * left.numel() ** 0.5
        assert not left[~mask].any()
    assert_same_bits(ours, run(features, reference, mask, normalize, segments))


@pytest.mark.parametrize("layout", ["tokens first", "hidden first", "part"])
def test_strides(device, layout):
    features, reference, mask, segments = on(device, *batch(torch.bfloat16, (3, 64, 96)))
    relaid = {
        "tokens first": lambda block: block.transpose(0, 1).contiguous().transpose(0, 1),
        "hidden first": lambda block: block.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "part": lambda block: torch.nn.functional.pad(block, (3, 5), value=torch.nan)[..., 3:-5],
    }[layout]
    moved = [relaid(block.detach()).requires_grad_() for block in features]
    value, gradients = run(moved, [relaid(block) for block in reference], mask, "sequence", segments)
    expected = truth(features, reference, mask, "sequence", segments)
    assert value.item() == pytest.approx(expected[0].item(), rel=2e-6)
    for left, right in zip(gradients, expected[1], strict=True):
        assert (left.double() - right).norm() <= 2.0**-8 * right.norm()


def test_two_streams(device, on_two_streams):
    features, reference, mask, segments = on(device, *batch(torch.bfloat16, (4, 500, 1024)))
    expected = run(features, reference, mask, "sequence", segments)
    for found in on_two_streams(lambda: run(features, reference, mask, "sequence", segments)):
        assert_same_bits(found, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_capture(device, captured, packed):
    features, reference, mask, segments = on(device, *batch(torch.bfloat16, (4, 100, 256)))
    segments = segments if packed else None
    expected = run(features, reference, mask, "sequence", segments)
    assert_same_bits(captured(lambda: run(features, reference, mask, "sequence", segments)), expected)


def test_more_elements_than_an_integer_counts(device):
    free, _ = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    if free < 24 << 30:
        pytest.skip("needs 24 GB")
    features = torch.ones(1, (1 << 31) // 4096 + 8, 4096, dtype=torch.bfloat16, device=device, requires_grad=True)
    reference = torch.full_like(features, 0.5)
    mask = torch.zeros(features.shape[:2], dtype=torch.bool, device=device)
    mask[0, -1] = True
    value = feature_distance([features], [reference], mask, "none")
    assert value.item() == 1024
    (gradient,) = torch.autograd.grad(value, features)
    assert (gradient[0, -1] == 1).all()
    assert not gradient[0, :-1].any()
