from __future__ import annotations

import pytest
import torch

from safelora_fast.ops import linear_kl, linear_kl_cross_entropy
from safelora_fast.ops.linear_kl import cross_entropy_reference, linear_kl_reference

TOKENS, HIDDEN, VOCABULARY = 700, 256, 50257


@pytest.fixture(autouse=True)
def is_served(served):
    served("linear_kl")


def inputs(device, dtype, drift=0.1):
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(1, TOKENS, HIDDEN, generator=generator)
    student = reference + drift * torch.randn(1, TOKENS, HIDDEN, generator=generator)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator) / 8
    mask = torch.rand(1, TOKENS, generator=generator) < 0.8
    labels = torch.randint(0, VOCABULARY, (1, TOKENS), generator=generator)
    labels[torch.rand(1, TOKENS, generator=generator) < 0.5] = -100
    student[~mask & (labels == -100)] = torch.nan
    given = (tensor.to(device, dtype) for tensor in (student, reference, head))
    return *given, mask.to(device), labels.to(device)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"softcap": 30.0, "temperature": 1.5, "logit_scale": 0.7}], ids=str)
def test_against_float64_twice(device, direction, dtype, tolerance, settings):
    student, reference, head, mask, labels = inputs(device, dtype)
    exact = student.double().nan_to_num(1.0).requires_grad_()
    student.requires_grad_()

    def ours():
        shared = linear_kl_cross_entropy(
            student, reference, head, mask, labels, kl_weight=0.3, cross_entropy_weight=0.01, direction=direction,
            figures=True, **settings,
        )  # fmt: skip
        return shared, torch.autograd.grad(shared.loss, student)[0]

    shared, gradient = ours()
    kl = (
        linear_kl_reference(exact, reference.double(), head.double(), mask, direction=direction, **settings)
        * mask.sum()
    )
    own = {name: value for name, value in settings.items() if name != "temperature"}
    nll, entropy, _ = cross_entropy_reference(exact, head.double(), labels, **own)
    assert shared.kl.item() == pytest.approx(kl.item(), rel=tolerance)
    assert shared.cross_entropy.item() == pytest.approx(nll.sum().item(), rel=tolerance)
    assert torch.allclose(shared.tokens.entropy[labels != -100].double(), entropy, rtol=tolerance)
    (expected,) = torch.autograd.grad(0.3 * kl + 0.01 * nll.sum(), exact)
    assert (gradient.double() - expected).norm() < tolerance * expected.norm()
    again, same = ours()
    assert torch.equal(again.loss, shared.loss)
    assert torch.equal(same, gradient)


def test_capture(device, captured):
    """The graph serves another mask than the one that it was captured with."""
    student, reference, head, mask, labels = inputs(device, torch.bfloat16)
    student.requires_grad_()

    def run():
        shared = linear_kl_cross_entropy(
            student, reference, head, mask, labels, kl_weight=0.3, cross_entropy_weight=0.01, figures=True
        )
        return shared.loss, shared.kl, shared.tokens.entropy, *torch.autograd.grad(shared.loss, student)

    alone = captured(lambda: linear_kl(student, reference, head, mask))
    assert torch.allclose(alone, linear_kl(student, reference, head, mask), rtol=1e-3)
    now, swapped = mask.clone(), mask.roll(3, 1)

    def change():
        mask.copy_(swapped)
        student.data.nan_to_num_(0.5)

    found = captured(run, change)
    for ours, theirs in zip(found, run(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-4 * theirs.abs().max().item())
    assert not torch.equal(now, mask)


def test_two_streams(device, on_two_streams):
    student, reference, head, mask, _ = inputs(device, torch.bfloat16)
    expected = linear_kl(student, reference, head, mask)
    assert expected > 0
    for found in on_two_streams(lambda: linear_kl(student, reference, head, mask)):
        assert torch.equal(found, expected)
