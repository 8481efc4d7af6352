"""KL and cross-entropy from one set of logits: values, weights, gradients, figures."""

from __future__ import annotations

import pytest
import torch
from test_linear_kl import MASK, SETTINGS, inputs, options, small_chunks

from safelora_fast.ops.linear_kl import (
    cross_entropy_reference,
    linear_kl,
    linear_kl_cross_entropy,
    linear_kl_reference,
)

# Labels inside and outside the mask, tokens in the mask without a label, and a row without any.
LABELS = torch.tensor([[3, -100, 36, 0, -100], [-100, 7, 7, 30, -100], [-100, -100, -100, -100, -100]])
WEIGHTS = {"kl_weight": 0.3, "cross_entropy_weight": 0.07}


def truth(student, reference, head, settings, bias):
    """(loss, Σ KL, Σ NLL) by whole logits."""
    given = options(settings, bias)
    kl = linear_kl_reference(student, reference, head, MASK, **given) * MASK.sum()
    own = {name: given[name] for name in ("bias", "logit_scale", "softcap") if name in given}
    cross_entropy = cross_entropy_reference(student, head, LABELS, **own)[0].sum()
    loss = WEIGHTS["kl_weight"] * kl + WEIGHTS["cross_entropy_weight"] * cross_entropy
    return loss, kl, cross_entropy


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("drift", [0.5, 5.0, 1e-2])
def test_value_and_gradient_in_float64(settings, drift, monkeypatch):
    small_chunks(monkeypatch)
    student, reference, head, bias = inputs(torch.float64, drift)
    shared = linear_kl_cross_entropy(
        student, reference, head, MASK, LABELS, **WEIGHTS, **options(settings, bias), figures=True
    )
    loss, kl, cross_entropy = truth(student, reference, head, settings, bias)
    assert shared.loss.item() == pytest.approx(loss.item(), rel=1e-9)
    assert shared.kl.item() == pytest.approx(kl.item(), rel=1e-9)
    assert shared.cross_entropy.item() == pytest.approx(cross_entropy.item(), rel=1e-9)
    assert not shared.kl.requires_grad
    assert not shared.cross_entropy.requires_grad
    ours, theirs = torch.autograd.grad(2 * shared.loss, student)[0], torch.autograd.grad(2 * loss, student)[0]
    assert (ours - theirs).norm() < 1e-9 * theirs.norm()
    assert not ours[~(MASK | (LABELS != -100))].any()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradcheck(settings):
    student, reference, head, bias = inputs(torch.float64)
    given = options(settings, bias)
    assert torch.autograd.gradcheck(
        lambda s: linear_kl_cross_entropy(s, reference, head, MASK, LABELS, **WEIGHTS, **given).loss, (student,)
    )


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_figures_of_the_tokens(settings, monkeypatch):
    small_chunks(monkeypatch)
    student, reference, head, bias = inputs(torch.float64, 1.0)
    labels, labelled = LABELS.clone(), LABELS != -100
    own = {name: value for name, value in options(settings, bias).items() if name not in {"direction", "temperature"}}
    *_, first = cross_entropy_reference(student, head, labels, **own)
    labels[0, 0], labels[1, 3] = first[0], first[-1]
    nll, entropy, first = cross_entropy_reference(student, head, labels, **own)
    tokens = linear_kl_cross_entropy(
        student, reference, head, MASK, labels, **WEIGHTS, **options(settings, bias), figures=True
    ).tokens
    assert torch.allclose(tokens.nll[labelled], nll, rtol=1e-9)
    assert torch.allclose(tokens.entropy[labelled], entropy, rtol=1e-9)
    assert torch.equal(tokens.is_top1[labelled], first == labels[labelled])
    assert 2 <= tokens.is_top1.sum() < labelled.sum()
    assert not any(figure[~labelled].any() for figure in (tokens.nll, tokens.entropy, tokens.is_top1))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("size", [1.0, 40.0], ids=["near", "so far that only logarithms tell"])
def test_float32(direction, size):
    student, reference, head, _ = inputs(torch.float32, 0.5 if size == 1 else 3.0, hidden=24, size=size)
    exact = student.detach().double().requires_grad_()
    settings = {"direction": direction}
    shared = linear_kl_cross_entropy(student, reference, head, MASK, LABELS, **WEIGHTS, **settings, figures=True)
    loss, kl, cross_entropy = truth(exact, reference.double(), head.double(), settings, None)
    assert shared.kl.item() == pytest.approx(kl.item(), rel=1e-4)
    assert shared.cross_entropy.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    ours, theirs = torch.autograd.grad(shared.loss, student)[0], torch.autograd.grad(loss, exact)[0]
    # Far away logits are in the thousands, and float32 rounds them by 5e-4.
    assert (ours - theirs).norm() < (1e-4 if size == 1 else 3e-2) * theirs.norm()
    _, entropy, _ = cross_entropy_reference(exact, head.double(), LABELS)
    assert torch.allclose(shared.tokens.entropy[LABELS != -100].double(), entropy, atol=5e-4 * size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_small_weights(dtype):
    """One over a million labels is below the smallest float16: only the ratio of the weights may meet the logits."""
    student, reference, head, _ = inputs(dtype, 0.1, vocabulary=501, hidden=24)
    exact = student.detach().double().requires_grad_()
    weights = {"kl_weight": 1e-8, "cross_entropy_weight": torch.tensor(1e-8)}
    shared = linear_kl_cross_entropy(student, reference, head, MASK, LABELS, **weights)
    kl = linear_kl_reference(exact, reference.double(), head.double(), MASK) * MASK.sum()
    cross_entropy = cross_entropy_reference(exact, head.double(), LABELS)[0].sum()
    assert shared.loss.dtype == torch.float32
    assert shared.loss.item() == pytest.approx(1e-8 * (kl + cross_entropy).item(), rel=2e-2)
    ours = torch.autograd.grad(shared.loss * 1e8, student)[0]
    theirs = torch.autograd.grad(kl + cross_entropy, exact)[0]
    assert ours.dtype == dtype
    assert (ours.double() - theirs).norm() < 3e-2 * theirs.norm()


def test_each_loss_alone():
    student, reference, head, _ = inputs(torch.float64)
    without_kl = linear_kl_cross_entropy(
        student, reference, head, MASK, LABELS, kl_weight=0.0, cross_entropy_weight=2.0
    ).loss
    expected = 2 * cross_entropy_reference(student, head, LABELS)[0].sum()
    ours, theirs = (torch.autograd.grad(value, student)[0] for value in (without_kl, expected))
    assert (ours - theirs).norm() < 1e-12 * theirs.norm()
    only_kl = linear_kl_cross_entropy(
        student, reference, head, MASK, torch.full_like(LABELS, -100), kl_weight=2.0, cross_entropy_weight=1.0
    )
    expected = 2 * linear_kl(student, reference, head, MASK) * MASK.sum()
    assert only_kl.cross_entropy.item() == 0
    assert only_kl.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(value, student)[0] for value in (only_kl.loss, expected))
    assert (ours - theirs).norm() < 1e-12 * theirs.norm()
    nothing = linear_kl_cross_entropy(student, reference, head, MASK, LABELS, kl_weight=0.0, cross_entropy_weight=0.0)
    assert nothing.loss.item() == 0
    assert not torch.autograd.grad(nothing.loss, student)[0].any()


def test_states_outside_mask_and_labels_are_not_looked_at():
    student, reference, head, _ = inputs(torch.float32)
    expected = linear_kl_cross_entropy(student, reference, head, MASK, LABELS, **WEIGHTS).loss.item()
    unused = ~(MASK | (LABELS != -100))
    assert unused.any()
    student.data[unused] = float("nan")
    assert linear_kl_cross_entropy(student, reference, head, MASK, LABELS, **WEIGHTS).loss.item() == expected


def test_refuses_labels_of_another_shape():
    student, reference, head, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"labels \(3, 4\) and mask \(3, 5\) disagree"):
        linear_kl_cross_entropy(student, reference, head, MASK, LABELS[:, :4], **WEIGHTS)
