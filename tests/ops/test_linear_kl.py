from __future__ import annotations

import pytest
import torch

from safelora_fast.ops.linear_kl import counted_tokens, linear_kl, linear_kl_reference
from safelora_fast.ops.linear_kl import head as head_module

MASK = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
SETTINGS = [
    {},
    {"direction": "forward"},
    {"temperature": 2.5},
    {"bias": True},
    {"softcap": 3.0, "logit_scale": 0.7, "bias": True, "direction": "forward"},
    {"softcap": 3.0, "temperature": 0.6},
]


def inputs(dtype, drift=0.5, vocabulary=37, hidden=6, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    reference = size * random(3, 5, hidden)
    student = reference + drift * size * random(3, 5, hidden)
    head, bias = random(vocabulary, hidden), random(vocabulary)
    return student.to(dtype).requires_grad_(), reference.to(dtype), head.to(dtype), bias.to(dtype)


def small_chunks(monkeypatch):
    """Several chunks of several blocks, the last ones not full."""
    monkeypatch.setitem(head_module.CHUNK_ELEMENTS, "cpu", 5 * 37)
    monkeypatch.setitem(head_module.BLOCK_ELEMENTS, "cpu", 2 * 37)


def options(settings, bias):
    return {**settings, "bias": bias if settings.get("bias") else None}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("drift", [0.5, 5.0, 1e-2])
@pytest.mark.parametrize("captured", [False, True])
def test_value_and_gradient_in_float64(settings, drift, captured, monkeypatch):
    """Also as while a CUDA graph is captured: then tokens that do not count are computed too."""
    small_chunks(monkeypatch)
    monkeypatch.setattr(counted_tokens, "is_captured", lambda _: captured)
    student, reference, head, bias = inputs(torch.float64, drift)
    value = linear_kl(student, reference, head, MASK, **options(settings, bias))
    expected = linear_kl_reference(student, reference, head, MASK, **options(settings, bias))
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    ours, theirs = torch.autograd.grad(value, student)[0], torch.autograd.grad(expected, student)[0]
    assert theirs.norm() > 1e-4
    assert (ours - theirs).norm() < 1e-9 * theirs.norm()
    assert not ours[~MASK].any()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradcheck(settings):
    student, reference, head, bias = inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: 3 * linear_kl(s, reference, head, MASK, **options(settings, bias)), (student,)
    )


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("drift", [0.5, 1e-2, 1e-3])
def test_float32_does_not_cancel_near_the_start(settings, drift):
    student, reference, head, bias = inputs(torch.float32, drift, vocabulary=501, hidden=24)
    exact = student.detach().double().requires_grad_()
    given = options(settings, bias)
    exact_given = {**given, "bias": None if given["bias"] is None else bias.double()}
    value = linear_kl(student, reference, head, MASK, **given)
    expected = linear_kl_reference(exact, reference.double(), head.double(), MASK, **exact_given)
    assert value.item() == pytest.approx(expected.item(), rel=2e-4)
    ours, theirs = torch.autograd.grad(value, student)[0], torch.autograd.grad(expected, exact)[0]
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_bfloat16_is_as_good_as_its_logits():
    student, reference, head, _ = inputs(torch.bfloat16, 0.1, vocabulary=501, hidden=24)
    exact = student.detach().double().requires_grad_()
    value = linear_kl(student, reference, head, MASK)
    expected = linear_kl_reference(exact, reference.double(), head.double(), MASK)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=3e-2)
    ours, theirs = torch.autograd.grad(value, student)[0], torch.autograd.grad(expected, exact)[0]
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - theirs).norm() < 3e-2 * theirs.norm()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_far_apart_stays_finite(direction):
    student, reference, head, _ = inputs(torch.float32, drift=3.0, size=40.0, vocabulary=101, hidden=24)
    exact = student.detach().double()
    value = linear_kl(student, reference, head, MASK, direction=direction)
    expected = linear_kl_reference(exact, reference.double(), head.double(), MASK, direction=direction)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.autograd.grad(value, student)[0].isfinite().all()


def test_identical_empty_and_padding():
    student, reference, head, _ = inputs(torch.float32, drift=0.0)
    value = linear_kl(student, reference, head, MASK)
    assert value.item() == 0
    assert not torch.autograd.grad(value, student)[0].any()
    student, reference, head, _ = inputs(torch.float32)
    expected = linear_kl(student, reference, head, MASK).item()
    student.data[~MASK] = float("nan")
    assert linear_kl(student, reference, head, MASK).item() == expected
    value = linear_kl(student, reference, head, torch.zeros_like(MASK))
    assert value.item() == 0
    assert not torch.autograd.grad(value, student)[0].any()


def test_autocast_gives_its_dtype_to_the_products_with_the_head():
    """As in a linear layer; the difference of the hidden states is taken before it is rounded."""
    student, reference, head, _ = inputs(torch.float32, drift=1e-3, vocabulary=501, hidden=24)
    exact = linear_kl_reference(student.detach().double(), reference.double(), head.double(), MASK).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = linear_kl(student, reference, head, MASK)
    assert value.dtype == torch.float32
    assert value.item() != linear_kl(student, reference, head, MASK).item()
    assert value.item() == pytest.approx(exact, rel=3e-2)
    assert torch.autograd.grad(value, student)[0].dtype == torch.float32


def test_refusals():
    student, reference, head, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match="direction"):
        linear_kl(student, reference, head, MASK, direction="sideways")
    with pytest.raises(ValueError, match="disagree"):
        linear_kl(student, reference, head, MASK[:, :3])
    with pytest.raises(ValueError, match="width"):
        linear_kl(student, reference, head[:, :3], MASK)


def test_a_second_derivative_is_refused():
    hidden = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    value = linear_kl(
        hidden, torch.randn_like(hidden).detach(), torch.randn(5, 4, dtype=torch.float64), torch.ones(1, 3).bool()
    )
    (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_kl has no second derivative"):
        torch.autograd.grad(gradient.square().sum(), hidden)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0, it must be positive"),
        ({"softcap": -1.0}, "softcap is -1.0, it must be positive"),
        ({"bias": torch.ones(4)}, r"the head has 5 rows, but a bias of shape \(4,\)"),
        ({"head_weight": torch.ones(0, 4)}, r"the head has shape \(0, 4\)"),
        ({"mask": torch.ones(1, 3)}, "mask is torch.float32"),
        ({"hidden": torch.ones(1, 3, 4).long()}, "hidden is torch.int64"),
    ],
)
def test_numbers_that_make_no_sense(change, message):
    given = {
        "hidden": torch.ones(1, 3, 4),
        "reference_hidden": torch.ones(1, 3, 4),
        "head_weight": torch.ones(5, 4),
        "mask": torch.ones(1, 3).bool(),
    }
    with pytest.raises(ValueError, match=message):
        linear_kl(**{**given, **change})
