"""The CUDA kernels of the feature distance, executed on the CPU, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from emulated_cuda import STREAM, emulated, record

from safelora_fast.ops.feature_distance import cuda, feature_distance_reference
from safelora_fast.ops.feature_distance.arguments import Comparison
from safelora_fast.ops.feature_distance.autograd import distance
from safelora_fast.ops.feature_distance.packing import pack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEGMENTS = torch.tensor([[5, 5, 5, 7, 7, 7, 7], [0, 2, 1, 1, 1, 2, -3], [3, 3, 3, 3, 3, 3, 3]])
MASK = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    emulated(monkeypatch)


def feature_distance(features, reference, mask, normalize, segments):
    return distance(cuda, Comparison(features, [r.detach() for r in reference], mask, normalize, segments))


def states(dtype, hidden, drift=0.3, seed=0, layers=2, batch=3, tokens=7):
    generator = torch.Generator().manual_seed(seed)
    reference = [torch.randn(batch, tokens, hidden, generator=generator) for _ in range(layers)]
    moved = [block + drift * torch.randn(block.shape, generator=generator) for block in reference]
    return [b.to(dtype).requires_grad_() for b in moved], [b.to(dtype) for b in reference]


def compare(features, reference, mask, normalize, segments, *, value=1e-6, gradient=None):
    """Value and gradients, times a weight from behind; NaN where nothing counts must not be seen."""
    exact = [block.detach().double().requires_grad_() for block in features]
    truth = feature_distance_reference(exact, [r.double() for r in reference], mask, normalize, segments)
    expected = torch.autograd.grad(3 * truth, exact, allow_unused=True)
    for block in [*features, *reference]:
        block.data[~mask] = float("nan")
    found = feature_distance(features, reference, mask, normalize, segments)
    assert (found.dtype, found.shape) == (torch.float32, ())
    assert found.item() == pytest.approx(truth.item(), rel=value, abs=1e-30)
    gradients = torch.autograd.grad(3 * found, features)
    for block, ours, theirs in zip(features, gradients, expected, strict=True):
        assert ours.dtype == block.dtype
        assert not ours[~mask].any()
        tolerance = gradient or max(2e-7, torch.finfo(block.dtype).eps if block.dtype != torch.float32 else 0)
        assert theirs.norm() > 1e-7
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
    return found, gradients


@pytest.mark.parametrize("normalize", ["sequence", "token", "none"])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
def test_value_and_gradient(dtype, segments, normalize):
    compare(*states(dtype, hidden=40), MASK, normalize, segments)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("hidden", [1, 3, 7, 8, 31, 255, 1024, 1031, 1100])
def test_any_width_gives_the_same_bits_wherever_it_lies(hidden, dtype):
    """The unrolled loop of 16-byte loads, what is left of it, and single elements where a token is not aligned."""
    features, reference = states(dtype, hidden, layers=1, tokens=3)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)
    found = compare(features, reference, mask, "sequence", None)
    shifted = [torch.cat([torch.zeros(3, 3, 1, dtype=dtype), block.detach()], 2) for block in [*features, *reference]]
    moved, held = shifted[0][..., 1:].requires_grad_(), shifted[1][..., 1:]
    again = feature_distance([moved], [held], mask, "sequence", None)
    assert torch.equal(again, found[0])
    assert torch.equal(torch.autograd.grad(3 * again, moved)[0], found[1][0])


def test_strides_and_mixed_types():
    features, reference = states(torch.float32, hidden=24)
    across = [block.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for block in features]
    compare(
        across, [r.expand(r.shape) for r in reference], MASK.T.contiguous().T, "sequence", SEGMENTS.T.contiguous().T
    )
    features, reference = states(torch.float32, hidden=24)
    turned = [block.detach().mT.contiguous().mT.requires_grad_() for block in features]
    compare(turned, [r.bfloat16() for r in reference], MASK, "token", None)


def test_many_layers_of_several_widths_and_types():
    blocks = [states(DTYPES[index // 50], 8 + index % 3, seed=index, layers=1) for index in range(52)]
    features, reference = [block[0][0] for block in blocks], [block[1][0] for block in blocks]
    compare(features, reference, MASK, "sequence", SEGMENTS)
    assert sum("cuLaunchKernel token_sums_f32" in line for line in record()) == 2  # 48 and 2 layers


def test_only_wanted_gradients_are_computed():
    features, reference = states(torch.float32, 12, layers=3)
    value = feature_distance(features, reference, MASK, "sequence", None)
    all_of_them = torch.autograd.grad(value, features)
    features[0].requires_grad_(requires_grad=False)
    value = feature_distance(features, reference, MASK, "sequence", None)
    for ours, theirs in zip(torch.autograd.grad(value, features[1:]), all_of_them[1:], strict=True):
        assert torch.equal(ours, theirs)
    assert record()[-2].startswith("cuLaunchKernel gradient_f32 grid 3 2 1 ")


@pytest.mark.parametrize("drift", [1e-1, 1e-3, 1e-5])
def test_no_cancellation_at_a_small_drift(drift):
    compare(*states(torch.float32, 64, drift=drift), MASK, "sequence", None)


def test_no_cancellation_where_states_grow():
    """d lies along h₀, thirty times as long as what is across."""
    features, reference = states(torch.float32, 512, drift=0.01)
    grown = [(f.detach() + 0.3 * r).requires_grad_() for f, r in zip(features, reference, strict=True)]
    compare(grown, reference, MASK, "sequence", None, gradient=1e-5)


def test_identical_zero_and_empty():
    features, reference = states(torch.float32, 9, drift=0.0)
    value = feature_distance(features, reference, MASK, "sequence", None)
    assert value.item() == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(value, features))
    zero = [torch.zeros_like(f, requires_grad=True) for f in features]
    value = feature_distance(zero, reference, MASK, "token", None)
    assert value.item() == pytest.approx(2 * MASK.sum().item() / 2)
    assert all(not gradient.any() for gradient in torch.autograd.grad(value, zero))
    for segments in (None, SEGMENTS):
        value = feature_distance(features, reference, torch.zeros_like(MASK), "sequence", segments)
        assert value.item() == 0
        assert all(not gradient.any() for gradient in torch.autograd.grad(value, features))
    empty = [torch.zeros(0, 7, 9, requires_grad=True)]
    value = feature_distance(empty, empty, torch.zeros(0, 7, dtype=torch.bool), "sequence", None)
    assert value.item() == 0
    assert torch.autograd.grad(value, empty)[0].shape == (0, 7, 9)


def test_nan_in_a_token_that_counts_shows():
    features, reference = states(torch.float32, 9)
    features[1].data[0, 1, 3] = float("nan")
    value = feature_distance(features, reference, MASK, "sequence", None)
    assert value.isnan()
    _, gradient = torch.autograd.grad(value, features)
    assert gradient[0].isnan().any()


def test_launches_are_on_the_stream_and_nothing_else_happens():
    features, reference = states(torch.bfloat16, 8)
    feature_distance(features, reference, MASK, "sequence", None).backward()
    calls = [line.split()[0] for line in record()]
    assert calls.count("cuLaunchKernel") == 4
    assert not {call for call in calls if "Synchronize" in call or "Alloc" in call or "cpy" in call}
    assert all(f"stream {STREAM:#x}" in line for line in record() if line.startswith("cuLaunchKernel"))


def test_second_derivatives_are_refused():
    features, reference = states(torch.float32, 8)
    value = feature_distance(features, reference, MASK, "sequence", None)
    gradients = torch.autograd.grad(value, features, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradients[0].sum().backward()


def test_packing_names_every_token_once_and_every_sequence():
    order, starts, counts = pack(MASK, SEGMENTS)
    assert (order.dtype, starts.dtype, counts.dtype) == (torch.int32,) * 3
    assert counts.tolist() == [2, 4, 0]
    assert order.sort(1).values.tolist() == [list(range(7))] * 3
    groups = [
        [order[row, starts[row, n] : starts[row, n + 1]].tolist() for n in range(counts[row])] for row in range(3)
    ]
    assert groups == [[[0, 1], [3, 4, 5]], [[6], [0], [2, 3, 4], [1, 5]], []]
    assert starts[2].tolist() == [0] * 8
