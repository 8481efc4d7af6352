"""The Triton kernel of KL and cross-entropy against whole logits in float64."""

from __future__ import annotations

import pytest
import torch
from nobody_waits import NobodyWaits

from safelora_fast.ops import linear_kl, linear_kl_cross_entropy
from safelora_fast.ops.linear_kl import counted_tokens, cross_entropy_reference, linear_kl_reference
from safelora_fast.ops.linear_kl import head as head_module
from safelora_fast.ops.linear_kl import triton as backend
from safelora_fast.ops.linear_kl.reference import logits

SETTINGS = [
    {},
    {"direction": "forward"},
    {"temperature": 2.5},
    {"bias": True, "direction": "forward", "temperature": 0.6},
    {"softcap": 3.0, "logit_scale": 0.7, "bias": True, "direction": "forward"},
    {"softcap": 3.0, "temperature": 0.6, "logit_scale": 1.5},
]
SETTING = pytest.mark.parametrize("settings", SETTINGS, ids=str)
DRIFT = pytest.mark.parametrize("drift", [1e-4, 1e-2, 0.5, 3.0])
MASK = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
LABELS = torch.tensor([[3, -100, 36, 0, -100], [-100, 7, 7, 30, -100], [-100, -100, -100, -100, -100]])


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    """Rows of several tiles, the last one not full, in several chunks."""
    monkeypatch.setattr(backend, "TILE", 64)
    monkeypatch.setitem(head_module.CHUNK_ELEMENTS, "cpu", 5 * 333)


def inputs(dtype, drift, vocabulary=333, hidden=24, size=1.0):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    reference = size * random(3, 5, hidden)
    student = reference + drift * size * random(3, 5, hidden)
    head, bias = random(vocabulary, hidden) / 2, random(vocabulary)
    student, reference = student.to(dtype), reference.to(dtype)
    student[~MASK & (LABELS == -100)] = torch.nan
    return student.requires_grad_(), reference, head.to(dtype), bias.to(dtype)


def options(settings, bias):
    return {**settings, "bias": bias if settings.get("bias") else None}


def exactly(student, reference, head, settings, bias):
    exact = student.detach().double().nan_to_num(1.0).requires_grad_()
    given = options(settings, bias if bias is None else bias.double())
    return exact, (exact, reference.double(), head.double(), MASK), given


@SETTING
@DRIFT
def test_divergence(settings, drift):
    student, reference, head, bias = inputs(torch.float32, drift)
    exact, arguments, given = exactly(student, reference, head, settings, bias)
    value = linear_kl(student, reference, head, MASK, **options(settings, bias))
    expected = linear_kl_reference(*arguments, **given)
    assert value.item() == pytest.approx(expected.item(), rel=2e-5)
    ours, theirs = torch.autograd.grad(value, student)[0], torch.autograd.grad(expected, exact)[0]
    assert (ours - theirs).norm() < 2e-5 * theirs.norm()
    assert not ours[~MASK].any()
    again = linear_kl(student, reference, head, MASK, **options(settings, bias))
    assert again.item() == value.item()


@SETTING
@pytest.mark.parametrize("drift", [1e-2, 3.0])
def test_with_cross_entropy(settings, drift):
    student, reference, head, bias = inputs(torch.float32, drift)
    exact, arguments, given = exactly(student, reference, head, settings, bias)
    own = {name: value for name, value in given.items() if name not in {"direction", "temperature"}}
    labels = LABELS.clone()
    labelled = labels != -100
    first = cross_entropy_reference(exact, head.double(), labels, **own)[2]
    labels[0, 0], labels[1, 3] = first[0], first[-1]
    shared = linear_kl_cross_entropy(
        student, reference, head, MASK, labels, kl_weight=0.3, cross_entropy_weight=0.07,
        **options(settings, bias), figures=True,
    )  # fmt: skip
    kl = linear_kl_reference(*arguments, **given) * MASK.sum()
    nll, entropy, first = cross_entropy_reference(exact, head.double(), labels, **own)
    assert shared.kl.item() == pytest.approx(kl.item(), rel=2e-5)
    assert torch.allclose(shared.tokens.nll[labelled].double(), nll, rtol=1e-5, atol=1e-6)
    assert torch.allclose(shared.tokens.entropy[labelled].double(), entropy, rtol=1e-5, atol=1e-6)
    best = logits(exact[labelled], head.double(), own["bias"], own.get("logit_scale", 1.0), own.get("softcap")).topk(2)
    clear = best.values[:, 0] - best.values[:, 1] > 1e-5  # a soft-cap makes large logits equal in float32
    assert torch.equal(shared.tokens.is_top1[labelled][clear], (first == labels[labelled])[clear])
    assert clear.any() or "softcap" in settings
    loss = 0.3 * kl + 0.07 * nll.sum()
    assert shared.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    ours, theirs = torch.autograd.grad(shared.loss, student)[0], torch.autograd.grad(loss, exact)[0]
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert not ours[~(MASK | labelled)].any()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_logits(direction, dtype):
    student, reference, head, _ = inputs(dtype, 0.1)
    exact, arguments, given = exactly(student, reference, head, {"direction": direction}, None)
    value = linear_kl(student, reference, head, MASK, direction=direction)
    expected = linear_kl_reference(*arguments, **given)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=3e-2)
    ours, theirs = torch.autograd.grad(value, student)[0], torch.autograd.grad(expected, exact)[0]
    assert ours.dtype == dtype
    assert (ours.double() - theirs).norm() < 3e-2 * theirs.norm()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("size", [20.0, 200.0])
def test_far_apart_only_logarithms_tell(direction, size):
    student, reference, head, _ = inputs(torch.float32, 3.0, size=size)
    exact, arguments, given = exactly(student, reference, head, {"direction": direction}, None)
    value = linear_kl(student, reference, head, MASK, direction=direction)
    expected = linear_kl_reference(*arguments, **given)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    ours, theirs = torch.autograd.grad(value, student)[0], torch.autograd.grad(expected, exact)[0]
    assert (ours - theirs).norm() < 1e-3 * size * theirs.norm()


def test_the_same_shift_of_every_logit_is_no_divergence():
    """A student whose logits are the reference's plus a constant: the running mean takes it away."""
    _, reference, head, _ = inputs(torch.float32, 0.0)
    head = torch.cat([head, torch.full((len(head), 1), 4.0)], 1)
    reference = torch.cat([reference.detach().nan_to_num(0.0), torch.zeros(3, 5, 1)], -1)
    student = reference.clone()
    student[..., -1] = 2.0
    value = linear_kl(student.requires_grad_(), reference, head, MASK)
    assert abs(value.item()) < 1e-12
    assert torch.autograd.grad(value, student)[0].abs().max() < 1e-5


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_classes_that_no_model_may_choose(direction):
    """Logits of −∞ by the bias, a whole tile of them first."""
    student, reference, head, bias = inputs(torch.float32, 0.1)
    bias[:100] = -torch.inf
    bias[200] = -torch.inf
    exact, arguments, given = exactly(
        student, reference, head[~bias.isinf()], {"direction": direction, "bias": True}, bias[~bias.isinf()]
    )
    shared = linear_kl_cross_entropy(
        student, reference, head, MASK, torch.full_like(LABELS, 150), kl_weight=1.0, cross_entropy_weight=1.0,
        bias=bias, direction=direction, figures=True,
    )  # fmt: skip
    expected = linear_kl_reference(*arguments, **given) * MASK.sum()
    assert shared.kl.item() == pytest.approx(expected.item(), rel=2e-5)
    labels = torch.full_like(LABELS, 50)
    nll, entropy, _ = cross_entropy_reference(exact, arguments[2], labels, bias=given["bias"])
    assert torch.allclose(shared.tokens.nll.flatten().double()[MASK.flatten()], nll[MASK.flatten()], rtol=1e-5)
    assert torch.allclose(shared.tokens.entropy.flatten().double()[MASK.flatten()], entropy[MASK.flatten()], rtol=1e-5)
    assert torch.autograd.grad(shared.kl + shared.loss, student)[0][MASK].isfinite().all()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("mask", [MASK, torch.zeros_like(MASK)], ids=["some", "none"])
def test_a_graph_computes_every_token_and_waits_for_none(direction, mask, monkeypatch):
    """As while a CUDA graph is captured: the same results, whatever lies in tokens that do not count."""
    student, reference, head, bias = inputs(torch.float32, 0.1)
    reference[1, 2] = torch.nan if not mask.any() else reference[1, 2]
    settings = {"direction": direction, "bias": bias, "softcap": 20.0}
    labels = LABELS if mask.any() else torch.full_like(LABELS, -100)

    def results():
        alone = linear_kl(student, reference, head, mask, **settings)
        shared = linear_kl_cross_entropy(
            student, reference, head, mask, labels, kl_weight=0.3, cross_entropy_weight=0.07, figures=True, **settings
        )
        gradients = [torch.autograd.grad(value, student)[0] for value in (alone, shared.loss)]
        figures = (shared.tokens.nll, shared.tokens.entropy, shared.tokens.is_top1)
        return alone, shared.loss, shared.kl, shared.cross_entropy, *figures, *gradients

    expected = results()
    with pytest.raises(AssertionError, match="nonzero"), NobodyWaits():
        results()
    monkeypatch.setattr(counted_tokens, "is_captured", lambda _: True)
    with NobodyWaits():
        found = results()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-5, atol=1e-7)
    assert expected[0] > 0 or not mask.any()


def test_identical_empty_and_bad():
    student, reference, head, _ = inputs(torch.float32, 0.0)
    value = linear_kl(student, reference, head, MASK)
    assert value.item() == 0
    assert not torch.autograd.grad(value, student)[0].any()
    value = linear_kl(student, reference, head, torch.zeros_like(MASK))
    assert value.item() == 0
    student.data[0, 0, 0] = torch.nan
    assert linear_kl(student, reference, head, MASK).isnan()
