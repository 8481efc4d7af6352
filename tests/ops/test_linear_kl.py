"""KL and cross-entropy from hidden states on every tier, compared with full logits in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from nobody_waits import NobodyWaits

from safelora_fast.ops import cuda_runtime, linear_kl, linear_kl_cross_entropy
from safelora_fast.ops.base import served_by
from safelora_fast.ops.linear_kl import OP, Head, chunks, triton
from safelora_fast.ops.triton_runtime import interpreted

SETTINGS = [
    {},
    {"direction": "forward"},
    {"temperature": 2.5},
    {"bias": True, "direction": "forward", "temperature": 0.6},
    {"softcap": 3.0, "logit_scale": 0.7, "bias": True, "direction": "forward"},
    {"softcap": 3.0, "temperature": 0.6, "logit_scale": 1.5, "weights": True},
]
SETTING = pytest.mark.parametrize("settings", SETTINGS, ids=str)
CASES = [(settings, drift) for settings in SETTINGS for drift in (1e-4, 3.0)]
if interpreted():  # takes 5 seconds a case: one drift for each setting, in turn
    CASES = [case for number, case in enumerate(CASES) if number % 4 in {0, 3}]
DIRECTION = pytest.mark.parametrize("direction", ["reverse", "forward"])
MASK = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
# Labels inside and outside the mask, tokens in the mask without a label, and a sequence without any.
LABELS = torch.tensor([[3, -100, 36, 0, -100], [-100, 7, 7, 30, -100], [-100, -100, -100, -100, -100]])
WEIGHTS = {"kl_weight": 0.3, "cross_entropy_weight": 0.07}
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 3e-2}
VOCABULARY = 150


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    """Several chunks of several blocks, padded rows of several tiles, the last of each partly filled."""
    monkeypatch.setitem(chunks.ROW_MULTIPLE, "cpu", chunks.ROW_MULTIPLE["other"])
    monkeypatch.setattr(triton, "TILE", 64)
    monkeypatch.setitem(chunks.CHUNK_ELEMENTS, "cpu", 5 * VOCABULARY)
    monkeypatch.setitem(chunks.BLOCK_ELEMENTS, "cpu", 2 * VOCABULARY)


class Inputs:
    """Hidden states, and the same losses from full logits in float64; tokens that do not count hold NaN."""

    def __init__(self, dtype, drift, settings=None, *, device="cpu", size=1.0, vocabulary=VOCABULARY, labels=LABELS):
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        reference = size * random(3, 5, 24)
        hidden = reference + drift * size * random(3, 5, 24)
        hidden[~MASK & (labels == -100)] = torch.nan
        head, bias = random(vocabulary, 24) / 2, random(vocabulary)
        hidden, reference, head, bias = (part.to(device, dtype) for part in (hidden, reference, head, bias))
        self.mask, self.labels = MASK.to(device), labels.to(device)
        self.given = hidden.requires_grad_(), reference, head, self.mask
        weights = torch.linspace(0.0, 20.0, 15, dtype=torch.float64, device=device).view(3, 5)
        self.settings = {**(settings or {}), "bias": bias if (settings or {}).get("bias") else None}
        self.settings["weights"] = weights if self.settings.get("weights") else None

    @property
    def hidden(self):
        return self.given[0]

    def kl(self):
        return linear_kl(*self.given, **self.settings)

    def shared(self, *, figures=True, **weights):
        return linear_kl_cross_entropy(
            *self.given, self.labels, **{**WEIGHTS, **weights}, **self.settings, figures=figures
        )

    def exact(self):
        """Return (hidden states, Σ KL, NLL, entropy, top-1 hits), the last three for the labels."""
        hidden, reference, head, mask = self.given
        hidden = hidden.detach().double().nan_to_num(1.0).requires_grad_()
        bias = None if self.settings["bias"] is None else self.settings["bias"].double()
        whole = Head(head.double(), bias, self.settings.get("logit_scale", 1.0), self.settings.get("softcap"))
        temperature = self.settings.get("temperature", 1.0)
        p, q = ((whole.logits(states[mask]) / temperature).log_softmax(-1) for states in (hidden, reference.double()))
        if self.settings.get("direction") == "forward":
            p, q = q, p
        labeled = self.labels != -100
        logits = whole.logits(hidden[labeled])
        log_p = logits.log_softmax(-1)
        nll = -log_p.gather(-1, self.labels[labeled][:, None])[:, 0]
        weights = 1.0 if self.settings["weights"] is None else self.settings["weights"][mask]
        return hidden, ((p.exp() * (p - q)).sum(-1) * weights).sum(), nll, -(log_p.exp() * log_p).sum(-1), logits

    def with_first_choices(self):
        """Make two labels the student's top predictions."""
        first = self.exact()[-1].argmax(-1)
        self.labels = self.labels.clone()
        self.labels[0, 0], self.labels[1, 3] = first[0], first[-1]
        return self


def assert_gradient(loss, hidden, expected, exact, rounding, unused):
    (ours,), (theirs,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, exact, retain_graph=True)
    assert ours.dtype == hidden.dtype
    assert theirs.norm() > 0
    assert (ours.double() - theirs).norm() < rounding * theirs.norm()
    assert not ours[unused].any()


def check(inputs, *, rounding):
    """Compare both losses, their gradients and the metrics of the tokens."""
    hidden, kl, nll, entropy, logits = inputs.exact()
    value, unused = inputs.kl(), ~inputs.mask
    assert value.item() == pytest.approx(kl.item() / max(inputs.mask.sum().item(), 1), rel=rounding)
    assert value.item() == inputs.kl().item()
    assert_gradient(value, inputs.hidden, kl / inputs.mask.sum(), hidden, rounding, unused)

    shared, labeled = inputs.shared(), inputs.labels != -100
    loss = WEIGHTS["kl_weight"] * kl + WEIGHTS["cross_entropy_weight"] * nll.sum()
    assert shared.loss.item() == pytest.approx(loss.item(), rel=rounding)
    assert shared.kl.item() == pytest.approx(kl.item(), rel=rounding)
    assert shared.cross_entropy.item() == pytest.approx(nll.sum().item(), rel=rounding)
    assert not shared.kl.requires_grad
    assert not shared.cross_entropy.requires_grad
    assert_gradient(2 * shared.loss, inputs.hidden, 2 * loss, hidden, rounding, unused & ~labeled)
    tokens = shared.tokens
    assert torch.allclose(tokens.nll[labeled].double(), nll, rtol=rounding, atol=rounding)
    assert torch.allclose(tokens.entropy[labeled].double(), entropy, rtol=rounding, atol=rounding)
    best = logits.topk(2).values
    clear = best[:, 0] - best[:, 1] > rounding  # a soft-cap makes large logits equal in float32
    hits = logits.argmax(-1) == inputs.labels[labeled]
    assert torch.equal(tokens.is_top1[labeled][clear], hits[clear])
    assert not any(figure[~labeled].any() for figure in (tokens.nll, tokens.entropy, tokens.is_top1))


@pytest.mark.parametrize(("settings", "drift"), CASES, ids=str)
def test_against_float64(tier, settings, drift):
    check(
        Inputs(torch.float32, drift, settings, device=tier).with_first_choices(),
        rounding=2e-4 if drift < 1e-3 else 2e-5,
    )


@SETTING
@pytest.mark.parametrize("drift", [1e-2, 0.5, 5.0])
def test_in_float64(settings, drift):
    check(Inputs(torch.float64, drift, settings).with_first_choices(), rounding=1e-9)


def test_the_oracle_takes_logits_for_exact():
    with served_by("reference"):
        inputs = Inputs(torch.float32, 1e-3, SETTINGS[4])
        assert inputs.kl().item() == pytest.approx(inputs.exact()[1].item() / MASK.sum().item(), rel=1e-4)


@DIRECTION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_logits(tier, direction, dtype):
    """Even if 1 / (a million labels) is below the smallest float16: only the ratio of the weights meets the logits."""
    inputs = Inputs(dtype, 0.1, {"direction": direction}, device=tier)
    hidden, kl, nll, *_ = inputs.exact()
    value = inputs.kl()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(kl.item() / MASK.sum().item(), rel=3e-2)
    shared = inputs.shared(kl_weight=1e-8, cross_entropy_weight=torch.tensor(1e-8), figures=False)
    assert shared.loss.dtype == torch.float32
    assert shared.loss.item() == pytest.approx(1e-8 * (kl + nll.sum()).item(), rel=2e-2)
    assert_gradient(1e8 * shared.loss, inputs.hidden, kl + nll.sum(), hidden, 3e-2, ~(MASK | (LABELS != -100)))


@DIRECTION
@pytest.mark.parametrize("size", [20.0, 200.0])
def test_far_apart_only_logarithms_tell(tier, direction, size):
    inputs = Inputs(torch.float32, 3.0, {"direction": direction}, size=size, device=tier)
    hidden, kl, nll, *_ = inputs.exact()
    shared = inputs.shared()
    assert shared.kl.item() == pytest.approx(kl.item(), rel=1e-4)
    assert shared.cross_entropy.item() == pytest.approx(nll.sum().item(), rel=1e-4)
    # Logits are in the thousands, where float32 rounding is 5e-4.
    loss = WEIGHTS["kl_weight"] * kl + WEIGHTS["cross_entropy_weight"] * nll.sum()
    unused = ~(inputs.mask | (inputs.labels != -100))
    assert_gradient(shared.kl + shared.loss, inputs.hidden, loss, hidden, 1e-3 * size, unused)


def test_the_same_shift_of_every_logit_is_no_divergence(tier):
    """The student's logits are the reference's plus a constant, which the mean removes."""
    _, reference, head, mask = Inputs(torch.float32, 0.0, device=tier).given
    head = torch.cat([head, torch.full((len(head), 1), 4.0, device=tier)], 1)
    reference = torch.cat([reference, torch.zeros(3, 5, 1, device=tier)], -1)
    student = reference.clone()
    student[..., -1] = 2.0
    value = linear_kl(student.requires_grad_(), reference, head, mask)
    assert abs(value.item()) < 1e-12
    assert torch.autograd.grad(value, student)[0].abs().max() < 1e-5


@DIRECTION
def test_classes_that_no_model_may_choose(tier, direction):
    """The bias makes logits −∞, first of all a whole tile of them."""
    settings = {"bias": True, "direction": direction}
    inputs = Inputs(torch.float32, 0.5, settings, device=tier, labels=torch.where(LABELS < 0, LABELS, LABELS + 100))
    inputs.settings["bias"][:80] = -torch.inf
    hidden, reference, head, mask = inputs.given
    allowed = Inputs(torch.float32, 0.5, settings, device=tier)
    allowed.given = hidden, reference, head[80:], mask
    allowed.settings["bias"] = inputs.settings["bias"][80:]
    allowed.labels = torch.where(inputs.labels < 0, inputs.labels, inputs.labels - 80)
    exact, kl, nll, entropy, _ = allowed.exact()
    shared, labeled = inputs.shared(), inputs.labels != -100
    assert shared.kl.item() == pytest.approx(kl.item(), rel=2e-5)
    assert torch.allclose(shared.tokens.nll[labeled].double(), nll, rtol=1e-5)
    if OP.choose(()).name != "eager":  # which multiplies zero by infinity
        assert torch.allclose(shared.tokens.entropy[labeled].double(), entropy, rtol=1e-5)
    loss = WEIGHTS["kl_weight"] * kl + WEIGHTS["cross_entropy_weight"] * nll.sum()
    assert_gradient(shared.loss, hidden, loss, exact, 2e-5, ~(mask | labeled))


@pytest.mark.parametrize(
    ("direction", "mask"), [("reverse", MASK), ("forward", torch.zeros_like(MASK))], ids=["some", "none"]
)
def test_a_graph_computes_every_token_and_waits_for_none(tier, direction, mask, monkeypatch):
    """During CUDA graph capture: the same results, whatever values the tokens that do not count hold."""
    settings = {"direction": direction, "bias": True, "softcap": 20.0}
    labels = LABELS if mask.any() else torch.full_like(LABELS, -100)
    inputs = Inputs(torch.float32, 0.1, settings, device=tier, labels=labels)
    inputs.mask = mask.to(tier)
    inputs.given = *inputs.given[:3], inputs.mask

    def results():
        alone, shared = inputs.kl(), inputs.shared()
        gradients = [torch.autograd.grad(value, inputs.hidden)[0] for value in (alone, shared.loss)]
        tokens = (shared.tokens.nll, shared.tokens.entropy, shared.tokens.is_top1)
        return alone, shared.loss, shared.kl, shared.cross_entropy, *tokens, *gradients

    expected = results()
    with pytest.raises(AssertionError, match="nonzero"), NobodyWaits():
        results()
    monkeypatch.setattr(cuda_runtime, "is_captured", lambda _: True)
    if OP.choose(()).name == "triton":
        with NobodyWaits():
            found = results()
    else:  # torch checks whether exponentials suffice
        found = results()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-5, atol=1e-7)
    assert expected[0] > 0 or not mask.any()


def test_identical_empty_and_bad(tier):
    inputs = Inputs(torch.float32, 0.0, device=tier)
    value = inputs.kl()
    assert value.item() == 0
    assert not torch.autograd.grad(value, inputs.hidden)[0].any()
    hidden, reference, head, mask = inputs.given
    value = linear_kl(hidden, reference, head, torch.zeros_like(mask))
    assert value.item() == 0
    assert not torch.autograd.grad(value, hidden)[0].any()
    hidden.data[0, 0, 0] = torch.nan
    assert inputs.kl().isnan()


def test_each_loss_alone():
    inputs = Inputs(torch.float64, 0.5)
    exact, kl, nll, *_ = inputs.exact()
    without_kl = inputs.shared(kl_weight=0.0, cross_entropy_weight=2.0).loss
    assert_gradient(without_kl, inputs.hidden, 2 * nll.sum(), exact, 1e-12, LABELS == -100)
    nothing = inputs.shared(kl_weight=0.0, cross_entropy_weight=0.0)
    assert nothing.loss.item() == 0
    assert not torch.autograd.grad(nothing.loss, inputs.hidden)[0].any()
    inputs.labels = torch.full_like(LABELS, -100)
    only_kl = inputs.shared(kl_weight=2.0, cross_entropy_weight=1.0)
    assert only_kl.cross_entropy.item() == 0
    assert only_kl.loss.item() == pytest.approx(2 * kl.item(), rel=1e-12)
    assert_gradient(only_kl.loss, inputs.hidden, 2 * kl, exact, 1e-12, ~MASK)


def test_autocast_gives_its_dtype_to_the_products_with_the_head():
    """As in a linear layer; the difference of the hidden states is computed before rounding."""
    inputs = Inputs(torch.float32, 1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = inputs.kl()
    assert value.dtype == torch.float32
    assert value.item() != inputs.kl().item()
    assert value.item() == pytest.approx(inputs.exact()[1].item() / MASK.sum().item(), rel=3e-2)
    assert torch.autograd.grad(value, inputs.hidden)[0].dtype == torch.float32


def test_a_second_derivative_is_refused():
    inputs = Inputs(torch.float64, 0.5)
    (gradient,) = torch.autograd.grad(inputs.kl(), inputs.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_kl has no second derivative"):
        torch.autograd.grad(gradient.square().sum(), inputs.hidden)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "sideways"}, "direction is 'sideways'"),
        ({"mask": torch.ones(1, 2).bool()}, "disagree"),
        ({"head_weight": torch.ones(5, 3)}, "the head has width 3, the hidden states 4"),
        ({"temperature": 0.0}, "temperature is 0.0, it must be positive"),
        ({"softcap": -1.0}, "softcap is -1.0, it must be positive"),
        ({"bias": torch.ones(4)}, r"the head has 5 rows, but a bias of shape \(4,\)"),
        ({"head_weight": torch.ones(0, 4)}, r"the head has shape \(0, 4\)"),
        ({"mask": torch.ones(1, 3)}, "mask is torch.float32"),
        ({"hidden": torch.ones(1, 3, 4).long()}, "hidden is torch.int64"),
        ({"labels": torch.ones(1, 2).long()}, r"labels \(1, 2\) and mask \(1, 3\) disagree"),
    ],
)
def test_what_it_refuses(change, message):
    states = torch.ones(1, 3, 4)
    given = {
        "hidden": states,
        "reference_hidden": states,
        "head_weight": torch.ones(5, 4),
        "mask": torch.ones(1, 3).bool(),
    }
    given |= change
    labels = given.pop("labels", None)
    call = linear_kl if labels is None else functools.partial(linear_kl_cross_entropy, labels=labels, **WEIGHTS)
    with pytest.raises(ValueError, match=message):
        call(**given)


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@DIRECTION
def test_entropy_where_a_class_is_ruled_out(tier, direction, kl_weight):
    generator = torch.Generator().manual_seed(3)
    hidden, reference, head = (torch.randn(*shape, generator=generator) for shape in ((1, 4, 8), (1, 4, 8), (9, 8)))
    bias = torch.zeros(9)
    bias[5] = -torch.inf
    given = [tensor.to(tier) for tensor in (hidden, reference, head)]
    labels = torch.tensor([[1, 2, 3, 4]], device=tier)
    found = linear_kl_cross_entropy(
        *given, labels > 0, labels, kl_weight=kl_weight, cross_entropy_weight=0.1, bias=bias.to(tier),
        direction=direction, figures=True,
    )  # fmt: skip
    exact = torch.distributions.Categorical(logits=(hidden.double() @ head.double().T)[..., bias.isfinite()]).entropy()
    assert torch.allclose(found.tokens.entropy.double().cpu(), exact, rtol=1e-5)
    assert found.loss.isfinite()
