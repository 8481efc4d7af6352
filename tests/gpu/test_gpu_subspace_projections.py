from __future__ import annotations

import pytest
import torch

from safelora_fast.ops import subspace_projection, subspace_projections
from safelora_fast.ops.subspace_projection import reference
from safelora_fast.ops.subspace_projection.grouped import matrix_products, transposed_products

SHAPES = [(1024, 1024), (2816, 1024), (1024, 2816), (256, 1024), (33, 70), (130, 65)]


@pytest.fixture(autouse=True)
def is_served(served):
    served("subspace_projections")


def random(device, *shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def close(ours, exact, tolerance=3e-6):
    assert (ours.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 64, 150])
def test_pairs_against_float64_twice(device, dtype, rank):
    pairs, factors = [], []
    for seed, shape in enumerate(SHAPES):
        base = random(device, *shape, seed=seed).to(dtype)
        pairs.append(((base + 0.05 * random(device, *shape, seed=seed + 50)).to(dtype), base))
        factors.append(random(device, shape[0], rank, seed=seed + 90))
    found = subspace_projections(pairs, factors)
    for (aligned, base), factor, projection in zip(pairs, factors, found, strict=True):
        v, b = aligned.double() - base.double(), factor.double()
        s = v @ (v.T @ b) / v.norm()
        close(projection.product, s)
        close(projection.cross_gram, b.T @ s)
        close(projection.product_gram, s.T @ s)
        assert projection.v_norm.item() == pytest.approx(v.norm().item(), rel=1e-6)
    for first, second in zip(found, subspace_projections(pairs, factors), strict=True):
        assert torch.equal(first.product, second.product)
        assert torch.equal(first.cross_gram, second.cross_gram)


@pytest.mark.parametrize("flipped", [False, True])
def test_bases_of_a_training_step(device, captured, on_two_streams, flipped):
    bases = [torch.linalg.qr(random(device, rows, 64, seed=rows))[0] for rows, _ in SHAPES[:4]]
    factors = [random(device, len(basis), 32, seed=len(basis) + 1) for basis in bases]
    if flipped:
        bases = [basis.T.contiguous().T for basis in bases]

    def project():
        inner, _ = transposed_products(bases, factors)
        return matrix_products(bases, inner)

    expected = project()
    for basis, factor, product in zip(bases, factors, expected, strict=True):
        close(product, basis.double() @ (basis.double().T @ factor.double()))
    for found in (captured(project), *on_two_streams(project)):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_pairs_in_a_graph(device, captured):
    """The Grams are of tensors that lie elsewhere in the graph; plans of other tensors push those of the warm-up out."""
    pairs = [(random(device, *shape, seed=1).half(), random(device, *shape, seed=2).half()) for shape in SHAPES]
    factors = [random(device, shape[0], 16, seed=3) for shape in SHAPES]
    expected = subspace_projections(pairs, factors)

    def push_out():
        for columns in range(1, 40):
            transposed_products([random(device, 64, columns)], [random(device, 64, 2)])

    for ours, theirs in zip(captured(lambda: subspace_projections(pairs, factors), push_out), expected, strict=True):
        for name in ("product", "v_norm", "gram", "cross_gram", "product_gram"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("normalize", ["frobenius", "spectral"])
def test_one_module(device, normalize):
    aligned, base, factor = random(device, 512, 300), random(device, 512, 300, seed=1), random(device, 512, 16, seed=2)
    ours = subspace_projection(aligned, base, factor, normalize=normalize)
    close(ours, reference(aligned.double(), base.double(), factor.double(), normalize=normalize), 1e-5)
