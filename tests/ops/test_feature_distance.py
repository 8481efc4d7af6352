"""The feature distance on every tier, compared with its definition in float64."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from emulated_cuda import STREAM, emulated, record
from feature_batches import assert_same_bits, assert_true, batch, definition, run, truth
from nobody_waits import NobodyWaits

from safelora_fast import _core
from safelora_fast.errors import SettingsError
from safelora_fast.ops import feature_distance
from safelora_fast.ops.base import served_by
from safelora_fast.ops.feature_distance import OP, native, triton
from safelora_fast.ops.feature_distance.cuda import pack

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NORMALIZATIONS = pytest.mark.parametrize("normalize", ["sequence", "token", "none"])
SEGMENTS = torch.tensor([[5, 5, 5, 7, 7, 7, 7], [0, 2, 1, 1, 1, 2, -3], [3, 3, 3, 3, 3, 3, 3]])
MASK = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)


@NORMALIZATIONS
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_value_and_gradients_twice(tier, dtype, normalize, packed):
    features, references, mask, segments = batch(DTYPES[dtype], device=tier)
    segments = segments if packed else None
    ours = run(features, references, mask, normalize, segments)
    assert ours[0].dtype == torch.float32
    assert ours[0] > 0
    assert_true(ours, truth(features, references, mask, normalize, segments), mask)
    assert_same_bits(ours, run(features, references, mask, normalize, segments))


@pytest.mark.parametrize("hidden", [1, 2, 7, 8, 31, 255, 1024, 1031])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_any_width_gives_the_same_bits_wherever_it_lies(tier, dtype, hidden):
    """Loops of wide loads, their remainder, and single elements if a token is not aligned."""
    features, references, mask, _ = batch(DTYPES[dtype], (2, 3, hidden), layers=1, device=tier)
    ours = run(features, references, mask)
    assert_true(ours, truth(features, references, mask), mask)
    moved, other = (torch.nn.functional.pad(states[0].detach(), (1, 0))[..., 1:] for states in (features, references))
    assert_same_bits(run([moved.requires_grad_()], [other], mask), ours)


@NORMALIZATIONS
def test_sequences_over_many_tiles(tier, normalize, monkeypatch):
    """Segment numbers may repeat later in a row; each tile of tokens starts in the middle of a sequence."""
    monkeypatch.setattr(triton, "TOKEN_TILE", 32)
    monkeypatch.setattr(triton, "BOUNDS_TILE", 16)
    features, references, mask, _ = batch(torch.float32, (2, 75, 8), layers=1, device=tier)
    segments = (torch.arange(75, device=tier) // 20 % 3).expand(2, 75)
    ours = run(features, references, mask, normalize, segments)
    assert_true(ours, truth(features, references, mask, normalize, segments), mask)


@pytest.mark.parametrize("shape", [(2, 150, 1024), (2, 260, 3584)], ids=str)
def test_many_units_of_work(tier, shape):
    if tier.type == "cpu" and OP.choose(()).name in {"triton", "cuda"}:
        shape = (2, 9, 530)  # the emulation and the interpreter would take minutes
    features, references, mask, segments = batch(torch.bfloat16, shape, layers=1, device=tier)
    ours = run(features, references, mask, "sequence", segments)
    assert_true(ours, truth(features, references, mask, "sequence", segments), mask)


@pytest.mark.parametrize("drift", [1e-1, 1e-3, 1e-5])
def test_no_cancellation_at_a_small_drift(tier, drift):
    """In float32, 2 − 2⟨x, x₀⟩ is off by 73 % at a relative drift of 1e-3."""
    features, references, mask, _ = batch(torch.float32, (2, 5, 128), drift=drift, device=tier)
    assert_true(run(features, references, mask), truth(features, references, mask), mask, value=3e-6, rounding=2e-6)


LAYOUTS = {
    "tokens first": lambda layer: layer.transpose(0, 1).contiguous().transpose(0, 1),
    "hidden with gaps": lambda layer: torch.stack([layer, torch.full_like(layer, torch.nan)], -1)[..., 0],
    "hidden first": lambda layer: layer.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "part of a wider tensor": lambda layer: torch.nn.functional.pad(layer, (3, 5, 1, 2), value=torch.nan)[
        :, 1:-2, 3:-5
    ],
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts(tier, layout):
    features, references, mask, segments = batch(torch.float32, (2, 6, 24), device=tier)
    expected = run(features, references, mask, "sequence", segments)
    moved = [LAYOUTS[layout](layer.detach()).requires_grad_() for layer in features]
    others = [LAYOUTS[layout](layer) for layer in references]
    mask, segments = mask.T.contiguous().T, segments.int().T.contiguous().T
    for given in (others, references):
        ours = run(moved, given, mask, "sequence", segments)
        assert_true(ours, truth(features, references, mask, "sequence", segments), mask)
        if OP.choose(()).name != "eager":
            assert_same_bits(ours, expected)


def test_one_reference_for_all(tier):
    features, references, mask, _ = batch(torch.float32, (3, 8, 24), poison=False, device=tier)
    shared = [layer[:1, :1].expand(3, 8, 24) for layer in references]
    assert_true(run(features, shared, mask, "token"), truth(features, shared, mask, "token"), mask)


@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_layers_that_differ(tier, normalize):
    """Layers that differ in width or dtype, or from their reference; one needs no gradient. Nothing waits for a GPU."""
    features, references, mask, segments = batch(torch.float32, (2, 6, 20), layers=4, device=tier)
    narrow, of_narrow, *_ = batch(torch.bfloat16, (2, 6, 12), layers=1, device=tier)
    features.insert(1, narrow[0])
    references.insert(1, of_narrow[0])
    references[3] = references[3].half()
    features = [layer.detach().requires_grad_() for layer in features]
    ours = run(features, references, mask, normalize, segments)
    assert_true(ours, truth(features, references, mask, normalize, segments), mask)
    wanted = [features[index] for index in (0, 1, 3, 4)]
    features[2] = features[2].detach()
    value = feature_distance(features, references, mask, normalize, segments)
    assert torch.equal(value, ours[0])
    if OP.choose(()).name in {"triton", "cuda"}:
        with NobodyWaits():
            value = feature_distance(features, references, mask, normalize, segments)
            gradients = torch.autograd.grad(0.3 * value, wanted)
    else:
        gradients = torch.autograd.grad(0.3 * value, wanted)
    assert_same_bits((value, gradients), (ours[0], [ours[1][index] for index in (0, 1, 3, 4)]))


@NORMALIZATIONS
def test_nothing_that_counts(tier, normalize):
    features, references, mask, segments = batch(torch.float32, device=tier)
    mask[1] = False
    for layer in (*features, *references):
        layer.data[1] = torch.nan
    assert_true(run(features, references, mask, normalize), truth(features, references, mask, normalize), mask)
    for numbers in (None, segments):
        value, gradients = run(features, references, torch.zeros_like(mask), normalize, numbers)
        assert value == 0
        assert not any(gradient.any() for gradient in gradients)
    for shape in [(0, 4, 8), (2, 0, 8)]:
        empty = torch.zeros(shape, requires_grad=True, device=tier)
        none = torch.zeros(shape[:2], dtype=torch.bool, device=tier)
        value, gradients = run([empty], [empty.detach()], none, normalize, none.int())
        assert value == 0
        assert gradients[0].shape == shape


def test_zero_vectors_and_identical_ones(tier):
    features, references, mask, _ = batch(torch.float32, poison=False, device=tier)
    value, gradients = run([layer.clone().requires_grad_() for layer in references], references, mask)
    assert value == 0
    assert not any(gradient.any() for gradient in gradients)
    zero = [torch.zeros_like(layer).requires_grad_() for layer in features]
    value, gradients = run(zero, references, mask, "token")
    assert value.item() == pytest.approx(len(zero) * mask.sum().item() / mask.any(1).sum().item())
    assert all(gradient.isfinite().all() for gradient in gradients)


@NORMALIZATIONS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_value_that_counts_shows(tier, normalize, bad):
    for where, other in ((0, 1.0), (1, 1.0), (0, 0.0)):
        states = [torch.full((2, 3, 5), other, device=tier), torch.zeros(2, 3, 5, device=tier)]
        states[where][1, 2, 4] = bad
        mask = torch.ones(2, 3, dtype=torch.bool, device=tier)
        assert not feature_distance([states[0]], [states[1]], mask, normalize).isfinite()


class TestFloat64:
    @NORMALIZATIONS
    @pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["rows", "packed"])
    def test_the_definition(self, normalize, segments):
        features, references, *_ = batch(torch.float64, (3, 7, 5), drift=0.3, poison=False)
        ours, expected = (
            run(features, references, MASK, normalize, segments),
            truth(features, references, MASK, normalize, segments),
        )
        assert ours[0].dtype == torch.float64
        assert_true(ours, expected, MASK, value=1e-12, rounding=1e-12)
        assert torch.autograd.gradcheck(
            lambda *f: 3 * feature_distance(f, references, MASK, normalize, segments), tuple(features)
        )

    def test_the_oracle_is_exact_for_any_dtype(self):
        features, references, mask, segments = batch(torch.bfloat16)
        with served_by("reference"):
            ours = run(features, references, mask, "token", segments)
        assert_true(ours, truth(features, references, mask, "token", segments), mask, value=1e-7)


def test_autocast_and_gradients_that_nobody_wants_change_nothing():
    features, references, mask, _ = batch(torch.float32)
    expected = run(features, references, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(run(features, references, mask), expected)
    with torch.no_grad():
        assert torch.equal(feature_distance(features, references, mask), expected[0])
    plain = feature_distance([f.detach() for f in features], [r.requires_grad_() for r in references], mask)
    assert not plain.requires_grad
    assert torch.equal(plain, expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives_are_refused(dtype):
    features, references, mask, _ = batch(dtype, poison=False, layers=1)
    weight = torch.tensor(2.0, dtype=dtype, requires_grad=True)
    value = weight * feature_distance(features, references, mask)
    (once,) = torch.autograd.grad(value, features, retain_graph=True)
    (tied,) = torch.autograd.grad(value, features, create_graph=True)
    assert torch.equal(once, tied)
    for wanted in (features, [weight]):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(tied.sum(), wanted, retain_graph=True)


def test_features_changed_before_the_backward_are_noticed():
    features, references, mask, _ = batch(torch.float32)
    moved = [f * 1.0 for f in features]
    value = feature_distance(moved, references, mask)
    moved[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


STATES = torch.ones(3, 7, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([STATES], [STATES], MASK, "rows"), "normalize is 'rows'"),
        (([STATES], [STATES], MASK[:2]), "disagree"),
        (([STATES], [], MASK), "1 layers of features and 0 of reference"),
        ((STATES, [STATES], MASK), "features is one tensor: it must be a list"),
        (([STATES], [STATES.long()], MASK), "must be floats"),
        (([STATES], [STATES], MASK.float()), "mask is torch.float32"),
        (([STATES], [STATES], MASK, "token", SEGMENTS[:, :2]), "segments"),
    ],
)  # fmt: skip
def test_what_it_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        feature_distance(*given)


class TestExtension:
    @pytest.mark.parametrize("drift", [1e-1, 1e-3, 1e-6])
    @pytest.mark.parametrize("aside", [1e-2, 1e-4])
    def test_states_that_grow_along_themselves(self, drift, aside):
        """The state is barely rotated: ‖d‖² − (p − q)² cancels to `aside`² of its terms, which float32 would lose."""
        generator = torch.Generator().manual_seed(0)
        reference, turn = (torch.randn(2, 9, 400, generator=generator) for _ in range(2))
        features = [(reference.double() * (1 + drift) + drift * aside * turn).float().requires_grad_()]
        value, (gradient,) = run(features, [reference], torch.ones(2, 9, dtype=torch.bool))
        exact = features[0].detach().double()
        p, q = exact.flatten(1).norm(dim=1), reference.double().flatten(1).norm(dim=1)
        gap = exact / p[:, None, None] - reference.double() / q[:, None, None]
        assert value.item() == pytest.approx(gap.square().sum().item() / 2, rel=1e-6)
        # The gradient is 2/p·(x − x₀) where x and x₀ are close.
        expected = 0.3 * gap / p[:, None, None]
        assert (gradient.double() - expected).norm() < (1e-6 + 2 * drift) * expected.norm()

    @pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18, 1e30])
    def test_sizes_whose_squares_leave_float32(self, size):
        features, references, mask, _ = batch(torch.float32, poison=False)
        features, references = [(size * f.detach()).requires_grad_() for f in features], [size * r for r in references]
        ours, expected = run(features, references, mask), truth(features, references, mask)
        assert ours[0].item() == pytest.approx(expected[0].item(), rel=2e-7)
        for left, right in zip(ours[1], expected[1], strict=True):
            assert (left.double() - right).norm() < 2e-7 * right.norm() + 1e-44

    @NORMALIZATIONS
    @pytest.mark.parametrize("dtype", list(DTYPES))
    def test_threads_and_levels_do_not_change_a_bit(self, monkeypatch, dtype, normalize):
        features, references, mask, segments = batch(DTYPES[dtype], (3, 160, 1100))
        outcomes = []
        for level in ("scalar", "avx2", "avx512"):
            monkeypatch.setenv("SAFELORA_FAST_CPU_LEVEL", level)
            try:
                _core.kernel_level()
            except SettingsError:
                continue
            for threads in ("1", "2", "7"):
                monkeypatch.setenv("SAFELORA_FAST_NUM_THREADS", threads)
                outcomes.append(run(features, references, mask, normalize, segments))
        for outcome in outcomes[1:]:
            assert_same_bits(outcome, outcomes[0])

    @pytest.mark.parametrize("is_busy", [False, True])
    def test_a_forked_child_makes_threads_of_its_own(self, monkeypatch, is_busy):
        """Whatever the parent is doing when it forks."""
        monkeypatch.setenv("SAFELORA_FAST_NUM_THREADS", "2")
        features, references, mask, _ = batch(torch.float32, (3, 100, 700))
        features = [f.detach() for f in features]
        expected = feature_distance(features, references, mask).item()
        stop, others = threading.Event(), []

        def keep_calling():
            while not stop.is_set():
                others.append(feature_distance(features, references, mask).item())

        thread = threading.Thread(target=keep_calling)
        if is_busy:
            thread.start()
        try:
            for _ in range(5):
                child = os.fork()
                if child == 0:
                    signal.alarm(30)
                    os._exit(0 if feature_distance(features, references, mask).item() == expected else 2)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            stop.set()
            if is_busy:
                thread.join()
        assert set(others) <= {expected}

    def test_threads_follow_torch_unless_the_variable_is_set(self, monkeypatch):
        monkeypatch.delenv("SAFELORA_FAST_NUM_THREADS", raising=False)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            assert native.threads() == 1
            torch.set_num_threads(4096)
            assert native.threads() == _core.default_threads()
        finally:
            torch.set_num_threads(before)
        monkeypatch.setenv("SAFELORA_FAST_NUM_THREADS", "3")
        assert native.threads() is None
        assert _core.default_threads() == 3


class TestCuda:
    @pytest.fixture(autouse=True)
    def served(self, monkeypatch):
        emulated(monkeypatch)
        with served_by("cuda"):
            yield

    def test_launches_are_on_the_stream_and_nothing_else_happens(self):
        features, references, mask, _ = batch(torch.bfloat16, (3, 7, 8))
        run(features, references, mask)
        calls = [line.split()[0] for line in record()]
        assert calls.count("cuLaunchKernel") == 4
        assert not {call for call in calls if "Synchronize" in call or "Alloc" in call or "cpy" in call}
        assert all(f"stream {STREAM:#x}" in line for line in record() if line.startswith("cuLaunchKernel"))

    def test_many_layers_of_several_widths_and_types(self):
        given = [
            batch(list(DTYPES.values())[index // 50], (3, 7, 8 + index % 3), seed=7, layers=1) for index in range(52)
        ]
        features, references, mask = [one[0][0] for one in given], [one[1][0] for one in given], given[0][2]
        assert_true(run(features, references, mask), truth(features, references, mask), mask)
        assert sum("cuLaunchKernel token_sums_f32" in line for line in record()) == 2  # 48 and 2 layers

    def test_packing_names_every_token_once_and_every_sequence(self):
        order, starts, counts = pack(MASK, SEGMENTS)
        assert (order.dtype, starts.dtype, counts.dtype) == (torch.int32,) * 3
        assert counts.tolist() == [2, 4, 0]
        assert order.sort(1).values.tolist() == [list(range(7))] * 3
        groups = [
            [order[row, starts[row, n] : starts[row, n + 1]].tolist() for n in range(counts[row])] for row in range(3)
        ]
        assert groups == [[[0, 1], [3, 4, 5]], [[6], [0], [2, 3, 4], [1, 5]], []]
        assert starts[2].tolist() == [0] * 8


def test_the_definition_counts_sequences():
    """Two sequences whose unit vectors are orthogonal and equal: (2 + 0) / 2."""
    features, reference = torch.eye(2)[None], torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    mask, segments = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0, 1]])
    assert definition([features], [reference], mask, "sequence", segments) == 1
