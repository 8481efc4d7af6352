"""The operations under torch.library's checks and torch.compile."""

from __future__ import annotations

import pytest
import torch
from feature_batches import batch, run
from test_linear_kl import MASK, inputs

from safelora_fast.ops import feature_distance, linear_kl, subspace_projection
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
    torch.library.opcheck(loss_library._forward, arguments)


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
