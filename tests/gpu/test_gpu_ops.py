"""Every operation on a GPU, on its examples and on sizes of real models, compared with the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from feature_batches import assert_same_bits, assert_true, batch, run, truth

from safelora_fast.ops import OPS, feature_distance, linear_kl, linear_kl_cross_entropy, subspace_projections
from safelora_fast.ops.base import outcomes, served_by
from safelora_fast.ops.self_test import TOLERANCES, largest_error, random_tensors
from safelora_fast.ops.subspace_projection import matrix_products, transposed_products

SHAPES = [(1024, 1024), (2816, 1024), (1024, 2816), (256, 1024), (33, 70), (130, 65)]
EVERY_OP = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@EVERY_OP
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_examples_twice(op, backend, device, dtype):
    if backend not in op.names:
        return
    for example in op.examples(random_tensors(device, dtype)):
        with served_by("reference"):
            exact = outcomes(example)
        ours = outcomes(example)
        assert largest_error(ours, exact) <= TOLERANCES[dtype]
        assert all(map(torch.equal, ours, outcomes(example)))


@EVERY_OP
def test_examples_in_a_graph_and_on_streams(op, backend, device, captured, on_two_streams):
    if backend not in op.names:
        return
    for example in op.examples(random_tensors(device, torch.float32)):
        expected = outcomes(example)
        for found in on_two_streams(lambda example=example: outcomes(example)):
            assert all(map(torch.equal, found, expected))
        # During capture a loss computes every token.
        assert largest_error(captured(lambda example=example: outcomes(example)), expected) <= 1e-5


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("shape", [(4, 300, 1024), (2, 260, 3584)], ids=str)
def test_feature_distance(device, shape, packed, captured):
    features, references, mask, segments = batch(torch.bfloat16, shape, device=device)
    given = features, references, mask, "sequence", segments if packed else None
    ours = run(*given)
    assert_true(ours, truth(*given), mask)
    assert_same_bits(captured(lambda: run(*given)), ours)


@pytest.mark.usefixtures("backend")
def test_more_elements_than_an_integer_counts(device):
    free, _ = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    if free < 24 << 30:
        pytest.skip("needs 24 GB")
    features = torch.ones(1, (1 << 31) // 4096 + 8, 4096, dtype=torch.bfloat16, device=device, requires_grad=True)
    reference = torch.full_like(features, 0.5)
    mask = torch.zeros(features.shape[:2], dtype=torch.bool, device=device)
    mask[0, -1] = True
    value = feature_distance([features], [reference], mask, "none")
    assert value.item() == 1024
    (gradient,) = torch.autograd.grad(value, features)
    assert (gradient[0, -1] == 1).all()
    assert not gradient[0, :-1].any()


def losses(hidden, reference, head, mask, labels, **settings):
    weights = {"kl_weight": 0.3, "cross_entropy_weight": 0.01}
    found = linear_kl_cross_entropy(hidden, reference, head, mask, labels, **weights, figures=True, **settings)
    return found.loss, found.kl, found.cross_entropy, found.tokens.nll, found.tokens.entropy


@pytest.fixture
def states(device):
    """Hidden states of 700 tokens, a head of 50257 classes, mask and labels; NaN where no token counts."""
    random = random_tensors(device, torch.float32)
    reference, head = random(1, 700, 256), random(50257, 256, seed=1) / 8
    hidden, mask = reference + 0.1 * random(1, 700, 256, seed=2), random(1, 700, seed=3) < 1
    labels = torch.arange(700, device=device)[None] * 71
    labels[random(1, 700, seed=4) < 0] = -100
    hidden[~mask & (labels == -100)] = torch.nan
    return hidden, reference, head, mask, labels


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"softcap": 30.0, "temperature": 1.5, "logit_scale": 0.7}], ids=str)
def test_losses_twice(states, direction, dtype, tolerance, settings):
    *tensors, mask, labels = states
    hidden, reference, head = (tensor.to(dtype) for tensor in tensors)

    def results(exact):
        given = [tensor.to(exact) for tensor in (hidden, reference, head)]
        given[0] = given[0].nan_to_num(1.0).requires_grad_()
        return outcomes((lambda *states: losses(*states, mask, labels, direction=direction, **settings), given))

    with served_by("triton"):
        ours = results(dtype)
        assert all(map(torch.equal, ours, results(dtype)))
    assert largest_error(ours, results(torch.float64)) < tolerance


def test_a_captured_loss_serves_another_mask(states, captured):
    hidden, reference, head = (tensor.bfloat16() for tensor in states[:3])
    hidden.requires_grad_()
    mask, labels = states[3:]
    swapped = mask.roll(3, 1)

    def results():
        return outcomes((lambda hidden: losses(hidden, reference, head, mask, labels), [hidden]))

    def change():
        mask.copy_(swapped)
        hidden.data.nan_to_num_(0.5)

    with served_by("triton"):
        alone = captured(lambda: linear_kl(hidden, reference, head, mask))
        assert torch.allclose(alone, linear_kl(hidden, reference, head, mask), rtol=1e-3)
        found = captured(results, change)
        for ours, theirs in zip(found, results(), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-4 * theirs.abs().max().item())


@pytest.fixture
def pairs(device, request):
    """Pairs of weights and factors of the given dtype and rank."""
    dtype, rank = request.param
    random = random_tensors(device, torch.float32)
    bases = [random(*shape, seed=seed) for seed, shape in enumerate(SHAPES)]
    moved = [base + 0.05 * random(*base.shape, seed=50) for base in bases]
    matrices = [(one.to(dtype), base.to(dtype)) for one, base in zip(moved, bases, strict=True)]
    return matrices, [random(shape[0], rank, seed=90) for shape in SHAPES]


def fields(projections):
    return [tensor for found in projections for tensor in (found.product, found.v_norm, found.gram, found.cross_gram)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "pairs", [(torch.float32, 3), (torch.bfloat16, 16), (torch.bfloat16, 17), (torch.float16, 64), (torch.float32, 150)],
    indirect=True, ids=str,
)  # fmt: skip
def test_projections_twice_and_in_a_graph(device, pairs, captured):
    """Plans of other tensors evict those of the warm-up before the replay."""
    with served_by("reference"):
        exact = fields(subspace_projections(*pairs))
    ours = fields(subspace_projections(*pairs))
    assert largest_error(ours, exact) <= 3e-6
    assert all(map(torch.equal, ours, fields(subspace_projections(*pairs))))

    def push_out():
        for columns in range(1, 40):
            transposed_products([torch.ones(64, columns, device=device)], [torch.ones(64, 2, device=device)])

    assert all(map(torch.equal, captured(lambda: fields(subspace_projections(*pairs)), push_out), ours))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("flipped", [False, True])
def test_bases_of_a_training_step(device, captured, on_two_streams, flipped):
    random = random_tensors(device, torch.float32)
    bases = [torch.linalg.qr(random(rows, 64, seed=rows))[0] for rows, _ in SHAPES[:4]]
    factors = [random(len(basis), 32, seed=1) for basis in bases]
    if flipped:
        bases = [basis.T.contiguous().T for basis in bases]

    def project():
        inner, _ = transposed_products(bases, factors)
        return matrix_products(bases, inner)

    expected = project()
    with served_by("reference"):
        assert largest_error(expected, project()) <= 3e-6
    for found in (captured(project), *on_two_streams(project)):
        assert all(map(torch.equal, found, expected))
