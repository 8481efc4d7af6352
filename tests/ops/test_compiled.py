"""The operations under torch.library's checks and torch.compile."""

from __future__ import annotations

import pytest
import torch
from feature_batches import batch, run
from test_linear_kl import MASK, inputs
from test_linear_kl_cross_entropy import LABELS

from safelora_fast.ops import (
    feature_distance,
    linear_kl,
    linear_kl_cross_entropy,
    subspace_projection,
    subspace_projections,
)
from safelora_fast.ops.feature_distance import library as distance_library
from safelora_fast.ops.linear_kl import library as loss_library
from safelora_fast.ops.subspace_projection import library as projection_library

# opcheck asks inputs that it has cast for their gradients
OPCHECK = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@OPCHECK
@pytest.mark.parametrize("normalize", ["sequence", "token", "none"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_opcheck_of_the_feature_distance(normalize, packed, dtype):
    features, reference, mask, segments = batch(torch.float32, (2, 5, 12), poison=False)
    features = [block.detach().to(dtype).requires_grad_() for block in features]
    arguments = (features, [block.to(dtype) for block in reference], mask, normalize, segments if packed else None)
    torch.library.opcheck(distance_library._forward, arguments)
    _, factors = distance_library._forward(*arguments)
    detached = ([block.detach() for block in features], *arguments[1:])
    torch.library.opcheck(distance_library._gradient, (*detached, factors.detach(), torch.tensor(0.3)))


@OPCHECK
@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("forward", [True, False])
def test_opcheck_of_the_divergence(differentiable, forward):
    student, reference, head, bias = inputs(torch.float32)
    student.requires_grad_(differentiable)
    arguments = (student, reference, head, bias, MASK, forward, 2.0, 0.7, 3.0, differentiable)
    torch.library.opcheck(loss_library._divergence, arguments)


@OPCHECK
@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("figures", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_opcheck_of_divergence_and_cross_entropy(differentiable, figures, dtype):
    student, reference, head, bias = inputs(dtype)
    student.requires_grad_(differentiable)
    weights = [torch.tensor(value, dtype=dtype) for value in (0.3, 0.07)]
    settings = (True, 2.0, 0.7, 3.0, figures, differentiable)
    arguments = (student, reference, head, bias, MASK.flatten(), LABELS.flatten(), *weights, *settings)
    torch.library.opcheck(loss_library._shared_loss, arguments)


@pytest.mark.parametrize("figures", [True, False])
@pytest.mark.parametrize("as_tensors", [True, False])
def test_divergence_and_cross_entropy_in_one_graph(figures, as_tensors):
    student, other, head, bias = inputs(torch.float32)
    weights = {"kl_weight": 0.3, "cross_entropy_weight": 0.07}
    if as_tensors:
        weights = {name: torch.tensor(value) for name, value in weights.items()}

    def loss(hidden):
        return linear_kl_cross_entropy(
            hidden * 1.5, other, head, MASK, LABELS, **weights, bias=bias, softcap=3.0, figures=figures
        )

    torch._dynamo.reset()
    expected, found = loss(student), torch.compile(loss, fullgraph=True, backend="aot_eager")(student)
    for name in ("loss", "kl", "cross_entropy"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-6)
    assert not found.kl.requires_grad
    assert (found.tokens is None) == (not figures)
    if figures:
        assert torch.allclose(found.tokens.nll, expected.tokens.nll, rtol=1e-6)
        assert torch.allclose(found.tokens.entropy, expected.tokens.entropy, rtol=1e-6)
        assert torch.equal(found.tokens.is_top1, expected.tokens.is_top1)
    (ours,), (theirs,) = (torch.autograd.grad(2 * given.loss, student) for given in (found, expected))
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)
    assert theirs.any()


def test_one_graph_for_a_loss_of_both():
    """fullgraph=True raises where the compiler would have to leave the graph; values and gradients stay the same bits."""
    features, reference, mask, segments = batch(torch.float32, (3, 5, 6))
    student, other, head, _ = inputs(torch.float32)

    def loss(blocks, hidden):
        distance = feature_distance([2 * block for block in blocks], reference, mask, "sequence", segments)
        return distance + 0.5 * linear_kl(hidden * 1.5, other, head, MASK)

    def differentiated(function):
        value = function(features, student)
        return value.detach(), *torch.autograd.grad(value, [*features, student])

    torch._dynamo.reset()
    expected = differentiated(loss)
    found = differentiated(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    for left, right in zip(found, expected, strict=True):
        assert torch.allclose(left, right, rtol=1e-6, atol=1e-8)
    assert expected[1].any()


def test_without_gradients_none_is_computed():
    student, other, head, _ = inputs(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda hidden: linear_kl(hidden, other, head, MASK), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        value = compiled(student)
    assert not value.requires_grad
    assert value.item() == pytest.approx(linear_kl(student, other, head, MASK).item(), rel=1e-6)


def test_the_compiled_gradient_skips_blocks_that_need_none():
    features, reference, mask, _ = batch(torch.float32, (3, 5, 6))
    features[0] = features[0].detach()
    torch._dynamo.reset()
    compiled = torch.compile(feature_distance, fullgraph=True, backend="aot_eager")
    value = compiled(features, reference, mask)
    (ours,) = torch.autograd.grad(value, [features[1]])
    (theirs,) = torch.autograd.grad(feature_distance(features, reference, mask), [features[1]])
    assert torch.equal(ours, theirs)
    assert run(features[1:], reference[1:], mask)[0] > 0


@pytest.mark.parametrize("normalize", ["frobenius", "spectral"])
def test_the_projection(normalize):
    aligned, base, factor = torch.randn(3, 12, 9).unbind()
    factor = factor[:, :4].T.contiguous().T
    torch.library.opcheck(projection_library.projection, (aligned, base, factor, normalize))
    torch._dynamo.reset()
    compiled = torch.compile(subspace_projection, fullgraph=True, backend="aot_eager")
    ours = compiled(aligned, base, factor, normalize=normalize)
    assert torch.equal(ours, subspace_projection(aligned, base, factor, normalize=normalize))


def test_the_projections_of_all_modules():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    basis = torch.linalg.qr(random(20, 6))[0]
    matrices = [(random(12, 9), random(12, 9)), basis, (random(7, 30).bfloat16(), random(7, 30).bfloat16())]
    factors = [random(12, 3), random(20, 4), random(7, 2).mT.contiguous().mT]
    minuends, subtrahends = [matrices[0][0], basis, matrices[2][0]], [matrices[0][1], matrices[2][1]]
    torch.library.opcheck(projection_library._projections, (minuends, subtrahends, [True, False, True], factors))
    torch._dynamo.reset()
    compiled = torch.compile(subspace_projections, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(matrices, factors), subspace_projections(matrices, factors), strict=True):
        for name in ("product", "gram", "cross_gram", "product_gram"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert torch.equal(ours.v_norm.nan_to_num(-1), theirs.v_norm.nan_to_num(-1))
    with pytest.raises(ValueError, match="module 0: the factor has 11 rows"):
        subspace_projections(matrices[:1], [random(11, 3)])
