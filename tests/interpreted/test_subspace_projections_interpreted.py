"""The grouped products' Triton kernels against float64."""

from __future__ import annotations

import pytest
import torch
from nobody_waits import NobodyWaits

from safelora_fast.ops import subspace_projection, subspace_projections
from safelora_fast.ops.subspace_projection import grouped_triton as backend
from safelora_fast.ops.subspace_projection import plans, reference
from safelora_fast.ops.subspace_projection.grouped import matrix_products, transposed_products
from safelora_fast.ops.subspace_projection.plans import KEPT

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several chunks of rows and tiles of columns in small matrices, and no plan of another test."""
    for name, value in {"CHUNK": 32, "COLUMN_TILE": 32, "ROW_TILE": 16, "STEP": 16}.items():
        monkeypatch.setattr(backend, name, value)
    backend._plans.recent.clear()
    backend._plans.captured.clear()


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(rows, columns, seed, dtype=torch.float32):
    base = random(rows, columns, seed=seed, dtype=dtype)
    return (base + 0.1 * random(rows, columns, seed=seed + 1)).to(dtype), base


def close(ours, exact, tolerance=1e-6):
    assert ours.dtype == torch.float32
    assert (ours.double() - exact).norm() <= tolerance * exact.norm()


@DTYPES
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 64])
def test_pairs_of_many_shapes(dtype, rank):
    shapes = [(40, 33), (16, 70), (7, 5), (96, 64)]
    pairs = [pair(*shape, seed, dtype) for seed, shape in enumerate(shapes)]
    factors = [random(shape[0], rank, seed=9 + seed) for seed, shape in enumerate(shapes)]
    projections = subspace_projections(pairs, factors)
    for (aligned, base), factor, found in zip(pairs, factors, projections, strict=True):
        v, b = aligned.double() - base.double(), factor.double()
        s = v @ (v.T @ b) / v.norm()
        close(found.product, s)
        assert found.v_norm.item() == pytest.approx(v.norm().item(), rel=1e-6)
        for gram, exact in ((found.gram, b.T @ b), (found.cross_gram, b.T @ s), (found.product_gram, s.T @ s)):
            close(gram, exact)
        right = random(rank, 50, seed=3).double()
        update, projected = b @ right, s @ right
        expected = (update * projected).sum() / (update.norm() * projected.norm())
        assert found.cosine(right @ right.T).item() == pytest.approx(expected.item(), rel=1e-6)
    again = subspace_projections(pairs, factors)
    assert all(torch.equal(one.product, other.product) for one, other in zip(projections, again, strict=True))
    assert all(torch.equal(one.cross_gram, other.cross_gram) for one, other in zip(projections, again, strict=True))


@pytest.mark.parametrize("rank", [1, 17, 64])
def test_bases(rank):
    bases = [torch.linalg.qr(random(rows, k, seed=rows))[0] for rows, k in [(40, 8), (70, 16), (33, 3)]]
    factors = [random(len(basis), rank, seed=len(basis) + 1) for basis in bases]
    for basis, factor, found in zip(bases, factors, subspace_projections(bases, factors), strict=True):
        u, b = basis.double(), factor.double()
        s = u @ (u.T @ b)
        close(found.product, s)
        close(found.cross_gram, b.T @ s)
        assert found.v_norm.isnan()


def test_layouts_of_matrices_and_factors():
    """Stored by columns, rows of a wider tensor, gaps everywhere, factors transposed: each group a launch, one result."""
    aligned, base = pair(48, 32, 1)
    factor = random(48, 5, seed=4)
    wide = torch.full((2, 48, 40), torch.nan)
    wide[0, :, 3:35], wide[1, :, 3:35] = aligned, base
    gaps = torch.full((48, 32, 2), torch.nan)
    gaps[..., 0] = aligned
    pairs = [
        (aligned, base),
        (aligned.T.contiguous().T, base.T.contiguous().T),
        (wide[0, :, 3:35], wide[1, :, 3:35]),
        (gaps[..., 0], base),
        (aligned.T.contiguous().T, base),
        (aligned, base.bfloat16()),
    ]
    factors = [factor, factor, factor.T.contiguous().T, factor, factor, factor]
    inner, squares = transposed_products(pairs, factors)
    outer = matrix_products(pairs, inner)
    for (left, right), found, square, product in zip(pairs, inner, squares, outer, strict=True):
        v = left.double() - right.double()
        close(found, v.T @ factor.double())
        close(product, v @ (v.T @ factor.double()))
        assert square.item() == pytest.approx(v.square().sum().item(), rel=1e-6)


def test_a_factor_wider_than_a_program():
    aligned, base = pair(40, 33, 1)
    factor = random(40, 150, seed=4)
    (found,) = subspace_projections([(aligned, base)], [factor])
    v = aligned.double() - base.double()
    close(found.product, v @ (v.T @ factor.double()) / v.norm())
    assert found.v_norm.item() == pytest.approx(v.norm().item(), rel=1e-6)
    close(found.gram, factor.double().T @ factor.double())


def test_nothing_to_project_on():
    same = random(20, 12)
    factor = random(20, 4, seed=1)
    (found,) = subspace_projections([(same, same)], [factor])
    assert torch.equal(found.product, factor)
    assert found.v_norm == 0
    inner, _ = transposed_products([torch.empty(0, 6), random(9, 6)], [torch.empty(0, 3), random(9, 3)])
    assert inner[0].shape == (6, 3)
    assert not inner[0].any()
    (outer,) = matrix_products([torch.empty(9, 0)], [torch.empty(0, 3)])
    assert torch.equal(outer, torch.zeros(9, 3))


def test_plans_follow_what_moves():
    """The plan of one set of tensors is not used for another that lies elsewhere."""
    first = subspace_projections([pair(40, 33, 1), pair(20, 10, 5)], [random(40, 5), random(20, 5)])
    second = subspace_projections([pair(40, 33, 1), pair(20, 10, 5)], [random(40, 5), random(20, 5)])
    assert all(torch.equal(one.product, other.product) for one, other in zip(first, second, strict=True))
    for seed in range(3 * KEPT):
        transposed_products([random(8, 4 + seed)], [random(8, 2)])
    assert len(backend._plans.recent) == KEPT


def test_a_graph_waits_for_nothing_and_keeps_what_it_reads(monkeypatch):
    """As while a CUDA graph is captured: what lies elsewhere than before has its plan uploaded by the graph."""
    pairs, factors = [pair(40, 33, 1), pair(20, 10, 5)], [random(40, 5), random(20, 5)]
    expected = subspace_projections(pairs, factors)
    backend._plans.recent.clear()
    monkeypatch.setattr(plans, "_is_captured", lambda _: True)
    with NobodyWaits():
        found = subspace_projections(pairs, factors)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.product, theirs.product)
        assert torch.equal(ours.product_gram, theirs.product_gram)
    tables = {plan.table.data_ptr() for plan in backend._plans.captured}
    assert len(tables) == len(backend._plans.captured) >= 3
    assert not backend._plans.recent


def test_tiles_fill_a_step_of_a_tensor_core():
    transposed_products([random(40, 1)], [random(40, 3)])
    (plan,) = backend._plans.recent.values()
    assert (plan.tile, plan.width) == (16, 16)


@DTYPES
@pytest.mark.parametrize("normalize", ["frobenius", "spectral"])
def test_one_module(dtype, normalize):
    aligned, base = pair(40, 33, 1, dtype)
    factor = random(40, 5, seed=2).to(dtype)
    ours = subspace_projection(aligned, base, factor, normalize=normalize)
    exact = reference(aligned.double(), base.double(), factor.double(), normalize=normalize)
    assert ours.dtype == dtype
    assert (ours.double() - exact).norm() < {torch.float32: 2e-6, torch.float16: 1e-3}.get(dtype, 1e-2) * exact.norm()


def test_refusals():
    with pytest.raises(ValueError, match="1 matrices and 2 factors"):
        transposed_products([random(4, 4)], [random(4, 2), random(4, 2)])
    with pytest.raises(ValueError, match=r"module 0: the factor has 5 rows, but the matrix is \[4, 3\]"):
        transposed_products([random(4, 3)], [random(5, 2)])
    with pytest.raises(ValueError, match=r"module 0: \[4, 3\], \[3, 4\], \[4, 2\] are not matrices that fit"):
        subspace_projections([(random(4, 3), random(3, 4))], [random(4, 2)])
