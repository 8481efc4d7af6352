"""The kernel that the CPU uses: layouts, poison, bits, forks."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from feature_batches import assert_same_bits, batch, run, truth

from safelora_fast import _core
from safelora_fast.errors import SettingsError
from safelora_fast.ops.feature_distance import eager, feature_distance, native, reference
from safelora_fast.ops.feature_distance.arguments import Comparison
from safelora_fast.ops.feature_distance.autograd import distance

ROUNDING = {torch.float32: 2e-7, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = pytest.mark.parametrize("dtype", list(ROUNDING), ids=["fp32", "fp16", "bf16"])
NORMALIZATIONS = pytest.mark.parametrize("normalize", ["sequence", "token", "none"])
SEGMENTS = pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What torch.empty gives is full of NaN, so that an output that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_true(ours, expected, mask):
    """The value to the rounding of the result, gradients to the rounding of their dtype, zero where nothing counts."""
    assert ours[0].dtype == torch.float32
    assert ours[0].item() == pytest.approx(expected[0].item(), rel=1.2e-7, abs=1e-12)
    for left, right in zip(ours[1], expected[1], strict=True):
        error = (left.double() - right).norm()
        assert error <= ROUNDING[left.dtype] * right.norm() + 2.0**-25 * left.numel() ** 0.5
        assert not left[~mask].any()


@DTYPES
@NORMALIZATIONS
@SEGMENTS
class TestAgainstTheDefinition:
    @pytest.mark.parametrize("hidden", [2, 31, 64, 100, 2049])
    def test_value_and_gradients(self, dtype, normalize, packed, hidden):
        features, reference, mask, segments = batch(dtype, (3, 11, hidden))
        segments = segments if packed else None
        ours = run(features, reference, mask, normalize, segments)
        assert ours[0] > 0
        assert_true(ours, truth(features, reference, mask, normalize, segments), mask)

    def test_many_units(self, dtype, normalize, packed):
        features, reference, mask, segments = batch(dtype, (2, 150, 1024), blocks=1)
        segments = segments if packed else None
        ours = run(features, reference, mask, normalize, segments)
        assert_true(ours, truth(features, reference, mask, normalize, segments), mask)


@DTYPES
@pytest.mark.parametrize("normalize", ["sequence", "none"])
def test_a_hidden_size_of_one(dtype, normalize):
    features, reference, mask, segments = batch(dtype, (3, 11, 1))
    ours = run(features, reference, mask, normalize, segments)
    assert_true(ours, truth(features, reference, mask, normalize, segments), mask)


@DTYPES
def test_unit_tokens_of_one_element_differ_in_sign_alone(dtype):
    features, reference, mask, _ = batch(dtype, (3, 11, 1), drift=2.0, blocks=1)
    value, (gradient,) = run(features, reference, mask, "token")
    flipped = (features[0].sign() != reference[0].sign())[mask].sum().item()
    assert flipped > 3
    assert value.item() == pytest.approx(4 * flipped / 3, rel=1e-6)
    assert ((gradient * features[0])[mask].abs() < 1e-6).all()
    assert not gradient[~mask].any()


def test_a_gradient_that_is_streamed_past_the_caches():
    features, reference, mask, _ = batch(torch.float32, (4, 300, 1024), blocks=1)
    assert_true(run(features, reference, mask), truth(features, reference, mask), mask)


@DTYPES
class TestLayouts:
    """Every layout gives the bits of the contiguous one."""

    def test_rows_apart(self, dtype):
        features, reference, mask, segments = batch(dtype)
        expected = run(features, reference, mask, "sequence", segments)
        wide = [torch.full((3, 12, 40), torch.nan, dtype=dtype) for _ in range(4)]
        for target, source in zip(wide, [*features, *reference], strict=True):
            target[:, 1:, 2:39] = source.detach()
        views = [tensor[:, 1:, 2:39] for tensor in wide]
        ours = run([view.requires_grad_() for view in views[:2]], views[2:], mask, "sequence", segments)
        assert_same_bits(ours, expected)

    def test_batch_after_tokens(self, dtype):
        features, reference, mask, segments = batch(dtype)
        expected = run(features, reference, mask, "sequence", segments)
        turned = [f.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for f in features]
        mask, segments = (tensor.T.contiguous().T for tensor in (mask, segments))
        assert not turned[0].is_contiguous()
        assert_same_bits(run(turned, reference, mask, "sequence", segments), expected)

    def test_hidden_apart(self, dtype):
        features, reference, mask, segments = batch(dtype)
        expected = run(features, reference, mask, "sequence", segments)
        turned = [f.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() for f in features]
        assert turned[0].stride(2) != 1
        assert_same_bits(run(turned, reference, mask, "sequence", segments), expected)

    def test_one_token_for_all(self, dtype):
        features, reference, mask, segments = batch(dtype, poison=False)
        expanded = [tensor[:1, :1].expand(tensor.shape) for tensor in reference]
        expected = run(features, [tensor.contiguous() for tensor in expanded], mask, "token", segments)
        assert_same_bits(run(features, expanded, mask, "token", segments), expected)


def test_blocks_of_several_dtypes_and_widths():
    """Only what asks for a gradient gets one, and each is that of its block alone."""
    parts = [batch(dtype, (3, 11, hidden), blocks=1) for hidden, dtype in enumerate(ROUNDING, start=30)]
    mask = parts[0][2]
    features, reference = [part[0][0] for part in parts], [part[1][0] for part in parts]
    features[1].requires_grad_(False)
    reference[0].requires_grad_()
    value = feature_distance(features, reference, mask)
    value.backward()
    assert features[1].grad is None
    assert reference[0].grad is None
    total = 0.0
    for f, r in zip(features, reference, strict=True):
        alone, (gradient,) = run([f.detach().requires_grad_()], [r], mask)
        total += alone.double()
        if f.requires_grad:
            assert torch.allclose(0.3 * f.grad.double(), gradient.double(), rtol=2e-2, atol=0)
    assert value.item() == pytest.approx(total.item(), rel=2e-7)


def test_a_reference_of_another_dtype():
    features, reference, mask, _ = batch(torch.bfloat16)
    reference = [tensor.float() + 1e-3 for tensor in reference]
    ours = run(features, reference, mask)
    assert ours[1][0].dtype == torch.bfloat16
    assert_true(ours, truth(features, reference, mask), mask)


def test_autocast_changes_nothing():
    features, reference, mask, _ = batch(torch.float32)
    expected = run(features, reference, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(run(features, reference, mask), expected)


def test_without_gradients():
    features, reference, mask, _ = batch(torch.float32)
    expected = feature_distance(features, reference, mask)
    assert expected.requires_grad
    with torch.no_grad():
        assert torch.equal(feature_distance(features, reference, mask), expected)
    plain = feature_distance([f.detach() for f in features], reference, mask)
    assert not plain.requires_grad
    assert torch.equal(plain, expected)


@NORMALIZATIONS
@pytest.mark.parametrize("shape", [(0, 7, 5), (2, 0, 5), (2, 7, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_compare(normalize, shape, dtype):
    features, reference = torch.zeros(shape, dtype=dtype, requires_grad=True), torch.zeros(shape, dtype=dtype)
    mask, segments = torch.ones(shape[:2], dtype=torch.bool), torch.zeros(shape[:2], dtype=torch.int64)
    value, (gradient,) = run([features], [reference], mask, normalize, segments)
    assert value == 0
    assert gradient.shape == shape


class TestCancellation:
    """What float32 sums lose."""

    @pytest.mark.parametrize("drift", [1e-1, 1e-3, 1e-6])
    @pytest.mark.parametrize("aside", [1e-2, 1e-4])
    def test_states_that_grow_along_themselves(self, drift, aside):
        """Little of the drift turns the state: ‖d‖² − (p − q)² cancels to `aside`² of its terms."""
        generator = torch.Generator().manual_seed(0)
        reference = torch.randn(2, 9, 400, generator=generator)
        turn = aside * torch.randn(2, 9, 400, generator=generator)
        features = [(reference.double() * (1 + drift) + drift * turn).float().requires_grad_()]
        mask = torch.ones(2, 9, dtype=torch.bool)
        value, (gradient,) = run(features, [reference], mask)
        exact = features[0].detach().double()
        p, q = exact.flatten(1).norm(dim=1), reference.double().flatten(1).norm(dim=1)
        gap = exact / p[:, None, None] - reference.double() / q[:, None, None]
        assert value.item() == pytest.approx(gap.square().sum().item() / 2, rel=1e-6)
        # The gradient is 2/p·(x − x₀) where x and x₀ are close.
        expected = 0.3 * gap / p[:, None, None]
        assert (gradient.double() - expected).norm() < (1e-6 + 2 * drift) * expected.norm()

    @pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18, 1e30])
    def test_sizes_whose_squares_leave_float32(self, size):
        features, reference, mask, _ = batch(torch.float32, poison=False)
        features = [(size * f.detach()).requires_grad_() for f in features]
        reference = [size * r for r in reference]
        ours, expected = run(features, reference, mask), truth(features, reference, mask)
        assert ours[0].item() == pytest.approx(expected[0].item(), rel=2e-7)
        for left, right in zip(ours[1], expected[1], strict=True):
            assert (left.double() - right).norm() < 2e-7 * right.norm() + 1e-44


@NORMALIZATIONS
@pytest.mark.parametrize("backend", [native, eager, reference], ids=["native", "eager", "reference"])
@pytest.mark.parametrize("where", ["features", "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_value_that_counts_shows(normalize, backend, where, bad):
    for other in (1.0, 0.0):
        states = {"features": torch.full((2, 3, 5), other), "reference": torch.full((2, 3, 5), 0.0)}
        states[where][1, 2, 4] = bad
        mask = torch.ones(2, 3, dtype=torch.bool)
        comparison = Comparison([states["features"]], [states["reference"]], mask, normalize, None)
        assert not distance(backend, comparison).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestSecondDerivative:
    def test_it_is_refused(self, dtype):
        features, reference, mask, _ = batch(torch.float32, poison=False, blocks=1)
        features = [features[0].detach().to(dtype).requires_grad_()]
        reference = [reference[0].to(dtype)]
        value = feature_distance(features, reference, mask)
        (once,) = torch.autograd.grad(value, features, retain_graph=True)
        (tied,) = torch.autograd.grad(value, features, create_graph=True)
        assert torch.equal(once, tied)
        with pytest.raises(RuntimeError, match="no second derivative"):
            tied.sum().backward()

    def test_not_even_in_the_weight_of_the_loss(self, dtype):
        features, reference, mask, _ = batch(torch.float32, poison=False, blocks=1)
        features = [features[0].detach().to(dtype).requires_grad_()]
        weight = torch.tensor(2.0, dtype=dtype, requires_grad=True)
        loss = weight * feature_distance(features, [reference[0].to(dtype)], mask)
        (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(gradient.sum(), weight)


def test_features_changed_before_the_backward_are_noticed():
    features, reference, mask, _ = batch(torch.float32)
    moved = [f * 1.0 for f in features]
    value = feature_distance(moved, reference, mask)
    moved[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def levels():
    known = []
    for level in ("scalar", "avx2", "avx512"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SAFELORA_FAST_CPU_LEVEL", level)
            try:
                known.append(_core.kernel_level())
            except SettingsError:
                continue
    return known


@DTYPES
@NORMALIZATIONS
def test_threads_and_levels_do_not_change_a_bit(monkeypatch, dtype, normalize):
    features, reference, mask, segments = batch(dtype, (3, 160, 1100))
    outcomes = []
    for level in levels():
        monkeypatch.setenv("SAFELORA_FAST_CPU_LEVEL", level)
        for threads in ("1", "2", "7"):
            monkeypatch.setenv("SAFELORA_FAST_NUM_THREADS", threads)
            outcomes.append(run(features, reference, mask, normalize, segments))
    for outcome in outcomes[1:]:
        assert_same_bits(outcome, outcomes[0])


class TestForks:
    """Threads stay with the parent: a child makes its own, whatever the parent was doing."""

    def child_agrees(self, expected, features, reference, mask):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(30)
                ours = feature_distance(features, reference, mask)
                code = 0 if ours.item() == expected else 2
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def test_after_a_call(self, monkeypatch):
        monkeypatch.setenv("SAFELORA_FAST_NUM_THREADS", "2")
        features, reference, mask, _ = batch(torch.float32, (3, 100, 700))
        expected = feature_distance(features, reference, mask).item()
        assert self.child_agrees(expected, features, reference, mask)
        assert feature_distance(features, reference, mask).item() == expected

    def test_during_calls(self, monkeypatch):
        monkeypatch.setenv("SAFELORA_FAST_NUM_THREADS", "2")
        features, reference, mask, _ = batch(torch.float32, (3, 100, 700))
        features = [f.detach() for f in features]
        expected = feature_distance(features, reference, mask).item()
        stop = threading.Event()
        others = []

        def keep_calling():
            while not stop.is_set():
                others.append(feature_distance(features, reference, mask).item())

        thread = threading.Thread(target=keep_calling)
        thread.start()
        try:
            assert all(self.child_agrees(expected, features, reference, mask) for _ in range(10))
        finally:
            stop.set()
            thread.join()
        assert set(others) == {expected}


def test_threads_follow_torch_unless_the_variable_is_set(monkeypatch):
    monkeypatch.delenv("SAFELORA_FAST_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert native._threads() == 1
        torch.set_num_threads(4096)
        assert native._threads() == _core.default_threads()
    finally:
        torch.set_num_threads(before)
    monkeypatch.setenv("SAFELORA_FAST_NUM_THREADS", "3")
    assert native._threads() is None
    assert _core.default_threads() == 3


class Wrapped(torch.Tensor):
    """A subclass, as distributed tensors are: its address need not lead to its values."""


def test_what_the_kernel_takes():
    plain = torch.zeros(1, 1, 1)
    assert native.refusal([plain, torch.nn.Parameter(plain)]) is None
    assert native.refusal([plain, plain.double()]) == "a tensor is float64"
    assert native.refusal([plain.to("meta")]) == "a tensor is on meta"
    assert "memory of its own" in native.refusal([plain.to_sparse()])
    assert "Wrapped" in native.refusal([plain.as_subclass(Wrapped)])
