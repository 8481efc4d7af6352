"""Every operation under torch.compile and under torch.library's checks."""

from __future__ import annotations

import pytest
import torch
from feature_batches import batch

from safelora_fast.ops import OPS, feature_distance, linear_kl
from safelora_fast.ops import feature_distance as distance_function
from safelora_fast.ops.base import outcomes
from safelora_fast.ops.feature_distance import _gradient_node
from safelora_fast.ops.feature_distance import _node as distance_node
from safelora_fast.ops.linear_kl import _node as loss_node
from safelora_fast.ops.self_test import random_tensors
from safelora_fast.ops.subspace_projection import _node as projection_node

# opcheck reads .grad of inputs that it has cast
OPCHECK = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
FLAGS = pytest.mark.parametrize("flag", [True, False])
RANDOM = random_tensors(torch.device("cpu"), torch.float32)


def compiled(function):
    """Compile with fullgraph=True, which raises on a graph break."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_examples_become_one_graph(op, dtype):
    for function, inputs in op.examples(random_tensors(torch.device("cpu"), dtype)):
        expected, found = outcomes((function, inputs)), outcomes((compiled(function), inputs))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)


@OPCHECK
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_opcheck_of_the_feature_distance(packed, dtype):
    features, references, mask, segments = batch(dtype, (2, 5, 12), poison=False)
    arguments = (features, references, mask, "sequence", segments if packed else None)
    torch.library.opcheck(distance_node, arguments)
    _, factors = distance_node(*arguments)
    detached = ([layer.detach() for layer in features], *arguments[1:])
    torch.library.opcheck(_gradient_node, (*detached, factors.detach(), torch.tensor(0.3)))


@OPCHECK
@FLAGS
@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_opcheck_of_the_losses(flag, differentiable, dtype):
    """With labels and metrics of the tokens, or with the divergence alone."""
    hidden, reference, head, bias = (RANDOM(*shape).to(dtype) for shape in ((2, 5, 8), (2, 5, 8), (37, 8), (37,)))
    hidden.requires_grad_(differentiable)
    weights = [*(torch.tensor(value, dtype=dtype) for value in (0.3, 0.07)), torch.rand(10) if flag else None]
    mask, labels = RANDOM(10) > -1, torch.arange(10) if flag else None
    settings = (True, 2.0, 0.7, 3.0, flag, differentiable)
    torch.library.opcheck(loss_node, (hidden, reference, head, bias, mask, labels, *weights, *settings))


@FLAGS
@pytest.mark.parametrize("normalize", ["frobenius", "spectral"])
def test_opcheck_of_the_projections(flag, normalize):
    minuends, subtrahends = (
        [RANDOM(12, 9), RANDOM(7, 30).bfloat16()],
        [RANDOM(12, 9, seed=1), RANDOM(7, 30, seed=1).bfloat16()],
    )
    is_pair, factors = [True, True], [RANDOM(4, 12).mT, RANDOM(7, 2)]
    if flag:
        minuends, is_pair = [*minuends, torch.linalg.qr(RANDOM(20, 6))[0]], [*is_pair, False]
        factors.append(RANDOM(20, 4))
    torch.library.opcheck(projection_node, (minuends, subtrahends, is_pair, factors, normalize, flag))


def test_one_graph_for_a_loss_of_both():
    features, references, mask, segments = batch(torch.float32, (3, 5, 6))
    hidden, other, head = RANDOM(3, 5, 6).requires_grad_(), RANDOM(3, 5, 6, seed=1), RANDOM(37, 6)

    def loss(*states):
        distance = feature_distance([2 * layer for layer in states[:-1]], references, mask, "sequence", segments)
        return distance + 0.5 * linear_kl(states[-1] * 1.5, other, head, mask)

    inputs = (*features, hidden)
    for ours, theirs in zip(outcomes((compiled(loss), inputs)), outcomes((loss, inputs)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)
        assert theirs.any()


def test_nothing_is_computed_that_nobody_asks_for():
    """No gradient under no_grad, and none for a layer that does not need one."""
    hidden, other, head = RANDOM(2, 5, 8).requires_grad_(), RANDOM(2, 5, 8, seed=1), RANDOM(37, 8)
    mask = torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        value = compiled(lambda hidden: linear_kl(hidden, other, head, mask))(hidden)
    assert not value.requires_grad
    assert value.item() == pytest.approx(linear_kl(hidden, other, head, mask).item(), rel=1e-6)
    features, references, mask, _ = batch(torch.float32, (3, 5, 6))
    features[0] = features[0].detach()
    (ours,) = torch.autograd.grad(compiled(distance_function)(features, references, mask), [features[1]])
    (theirs,) = torch.autograd.grad(feature_distance(features, references, mask), [features[1]])
    assert torch.equal(ours, theirs)
