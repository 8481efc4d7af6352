"""The projection of one module and of many, on every tier, compared with float64."""

from __future__ import annotations

import pytest
import torch
from emulated_cuda import emulated, record
from nobody_waits import NobodyWaits

from safelora_fast.defenses.parts.grouped_penalties import subspace_penalties, subspace_penalty
from safelora_fast.ops import cuda_runtime, plans, subspace_projection, subspace_projections
from safelora_fast.ops.base import served_by
from safelora_fast.ops.plans import KEPT
from safelora_fast.ops.subspace_projection import OP, matrix_products, transposed_products, triton

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EVERY_DTYPE = pytest.mark.parametrize("dtype", list(DTYPES))
NORMALIZATIONS = pytest.mark.parametrize("normalize", ["frobenius", "spectral"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Split small matrices into several chunks and tiles, and drop the plans of other tests."""
    for name, value in {"CHUNK": 32, "COLUMN_TILE": 32, "ROW_TILE": 16, "STEP": 16}.items():
        monkeypatch.setattr(triton, name, value)
    triton._plans.recent.clear()
    triton._plans.captured.clear()


def random(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def pair(rows, columns, seed=0, dtype=torch.float32, device="cpu"):
    base = random(rows, columns, seed=seed)
    moved = base + 0.1 * random(rows, columns, seed=seed + 50)
    return moved.to(device, dtype), base.to(device, dtype)


def basis(rows, columns, device="cpu"):
    return torch.linalg.qr(random(rows, columns, seed=rows).double())[0].float().to(device)


def values(matrix):
    return matrix[0].double() - matrix[1].double() if isinstance(matrix, tuple) else matrix.double()


def projected(aligned, base, lora_b, normalize="frobenius"):
    """C·B in float64, by definition."""
    v = aligned.double() - base.double()
    norm = torch.linalg.matrix_norm(v) if normalize == "frobenius" else torch.linalg.matrix_norm(v, ord=2).square()
    return v @ (v.mT @ lora_b.double()) / norm


def close(found, truth, tolerance=1e-6):
    assert found.dtype == torch.float32
    assert found.shape == truth.shape
    assert (found.double() - truth).norm() <= tolerance * truth.norm()


def check_products(matrices, left, right):
    """Check both products, and ‖V‖² of pairs."""
    found, squares = transposed_products(matrices, left)
    for matrix, factor, ours, square in zip(matrices, left, found, squares, strict=True):
        close(ours, values(matrix).mT @ factor.double())
        truth = values(matrix).square().sum().item() if isinstance(matrix, tuple) else 0.0
        assert square.item() == pytest.approx(truth, rel=1e-6)
    for matrix, factor, ours in zip(matrices, right, matrix_products(matrices, right), strict=True):
        close(ours, values(matrix) @ factor.double())


@EVERY_DTYPE
@pytest.mark.parametrize("rank", [1, 8, 17])
def test_many_modules_twice(tier, dtype, rank):
    shapes = [(40, 33), (7, 5), (96, 64)]
    matrices = [pair(*shape, seed, DTYPES[dtype], tier) for seed, shape in enumerate(shapes)]
    matrices.append(basis(40, 8, tier))
    factors = [random(rows, rank, seed=9, device=tier) for rows in (40, 7, 96, 40)]
    projections = subspace_projections(matrices, factors)
    for matrix, factor, found in zip(matrices, factors, projections, strict=True):
        v, b = values(matrix), factor.double()
        s = v @ (v.mT @ b) / (v.norm() if isinstance(matrix, tuple) else 1)
        close(found.product, s)
        assert found.v_norm.item() == pytest.approx(v.norm().item(), rel=1e-6) or found.v_norm.isnan()
        assert found.v_norm.isnan() != isinstance(matrix, tuple)
        for gram, exact in ((found.gram, b.mT @ b), (found.cross_gram, b.mT @ s), (found.product_gram, s.mT @ s)):
            close(gram, exact)
        right = random(rank, 50, seed=3, device=tier).double()
        update, moved = b @ right, s @ right
        expected = (update * moved).sum() / (update.norm() * moved.norm())
        assert found.cosine(right @ right.mT).item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(projections, subspace_projections(matrices, factors), strict=True):
        assert torch.equal(one.product, other.product)
        assert torch.equal(one.cross_gram, other.cross_gram)


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(1, 1), (1, 65), (16, 64), (33, 130), (129, 70)], ids=str)
def test_shapes(tier, dtype, shape):
    rows, columns = shape
    matrices = [
        pair(rows, columns, 3, DTYPES[dtype], tier),
        random(rows, columns, seed=4, dtype=DTYPES[dtype], device=tier),
    ]
    left, right = random(rows, 5, seed=1, device=tier), random(columns, 5, seed=2, device=tier)
    check_products(matrices, [left, left], [right, right])


@pytest.mark.parametrize("rank", [64, 150])
def test_wide_factors(tier, rank):
    matrix = pair(40, 33, 1, device=tier)
    check_products([matrix], [random(40, rank, device=tier)], [random(33, rank, device=tier)])


def test_layouts_and_mixed_types(tier):
    """Column-major, rows of a wider tensor, gaps everywhere, transposed factors: several groups, one result."""
    aligned, base = pair(48, 32, 1, device=tier)
    wide = torch.full((2, 70, 59), torch.nan, device=tier)
    wide[0, 3:51, 3:35], wide[1, 3:51, 3:35] = aligned, base
    gaps = torch.full((48, 32, 2), torch.nan, device=tier)
    gaps[..., 0] = aligned
    turned = aligned.T.contiguous().T
    matrices = [
        (aligned, base),
        (turned, base.T.contiguous().T),
        (wide[0, 3:51, 3:35], wide[1, 3:51, 3:35]),
        (gaps[..., 0], base),
        (turned, base),
        (aligned, base.bfloat16()),
        turned,
        random(48, 64, device=tier)[:, ::2],
    ]
    left, right = random(48, 5, seed=4, device=tier), random(32, 5, seed=5, device=tier)
    lefts = [left, left, left.T.contiguous().T, left, left.half(), left, random(48, 9, device=tier)[:, 1:6], left]
    check_products(matrices, lefts, [right, right.bfloat16(), right.T.contiguous().T, *[right] * 5])


def test_nothing_to_project_on(tier):
    same, factor = random(20, 12, device=tier), random(20, 4, seed=1, device=tier)
    (found,) = subspace_projections([(same, same)], [factor])
    assert torch.equal(found.product, factor)
    assert found.v_norm == 0
    (bad,) = subspace_projections([(same, torch.full_like(same, torch.nan))], [factor])
    assert bad.product.isnan().any()
    if OP.choose(()).name != "cuda":
        inner, _ = transposed_products(
            [torch.empty(0, 6, device=tier), random(9, 6, device=tier)],
            [torch.empty(0, 3, device=tier), random(9, 3, device=tier)],
        )
        assert inner[0].shape == (6, 3)
        assert not inner[0].any()
        (outer,) = matrix_products([torch.empty(9, 0, device=tier)], [torch.empty(0, 3, device=tier)])
        assert torch.equal(outer, torch.zeros(9, 3, device=tier))


def test_plans_follow_what_moves(tier):
    """A plan is not reused for tensors at other addresses, or with other shapes at the same addresses."""
    whole = random(3, 40, 40, device=tier)
    for rows, columns in ((40, 33), (20, 33), (40, 33)):
        matrix, left = (whole[0, :rows, :columns], whole[1, :rows, :columns]), whole[2, :rows, :5]
        check_products([matrix], [left], [whole[2, :columns, :4]])
    first, second = (
        subspace_projections([pair(40, 33, 1, device=tier)], [random(40, 5, device=tier)])[0] for _ in range(2)
    )
    assert torch.equal(first.product, second.product)


@EVERY_DTYPE
@NORMALIZATIONS
def test_one_module(tier, dtype, normalize):
    aligned, base = pair(37, 53, 1, DTYPES[dtype], tier)
    lora_b = random(37, 5, seed=2, dtype=DTYPES[dtype], device=tier)
    before = [tensor.clone() for tensor in (aligned, base, lora_b)]
    ours = subspace_projection(aligned, base, lora_b, normalize=normalize)
    exact = projected(aligned, base, lora_b, normalize)
    assert ours.dtype == DTYPES[dtype]
    tolerance = 2e-6 if dtype == "fp32" else torch.finfo(DTYPES[dtype]).eps
    assert (ours.double() - exact).norm() <= tolerance * exact.norm()
    same = subspace_projection(aligned, aligned.clone(), lora_b, normalize=normalize)
    assert torch.equal(same, lora_b)
    assert same.data_ptr() != lora_b.data_ptr()
    assert all(map(torch.equal, (aligned, base, lora_b), before))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided B", "mixed"])
def test_one_module_of_any_layout(tier, layout):
    (aligned, base), lora_b = pair(37, 53, device=tier), random(37, 5, device=tier)
    if layout == "transposed":
        aligned, base = aligned.mT.contiguous().mT, base.mT.contiguous().mT
    elif layout == "sliced":
        aligned, base = torch.cat([aligned, aligned], 1)[:, 53:], torch.cat([base, base])[:37]
    elif layout == "strided B":
        lora_b = random(5, 74, device=tier).mT[::2]
    else:
        aligned, base = aligned.mT.contiguous().mT, base.bfloat16()
    close(subspace_projection(aligned, base, lora_b), projected(aligned, base, lora_b))


def test_penalties_and_gradients(tier):
    shapes = [(40, 3, 21, 4), (33, 3, 50, 8), (16, 5, 16, 2)]
    bases = [basis(m, k, tier) for m, _, _, k in shapes]
    lefts = [random(m, r, seed=m + 1, device=tier).requires_grad_() for m, r, _, _ in shapes]
    rights = [random(r, n, seed=m + 2, device=tier).requires_grad_() for m, r, n, _ in shapes]
    scales, weights = [1.5, 0.5, 2.0], torch.tensor([1.0, 2.0, 3.0], device=tier)
    found = torch.stack(subspace_penalties(bases, lefts, rights, scales))
    exact = [factor.detach().double().requires_grad_() for factor in (*lefts, *rights)]
    expected = torch.stack([subspace_penalty(exact[i], exact[3 + i], scales[i], bases[i].double()) for i in range(3)])
    assert torch.allclose(found.double(), expected, rtol=1e-5)
    ours = torch.autograd.grad((weights * found).sum(), [*lefts, *rights])
    theirs = torch.autograd.grad((weights * expected).sum(), exact)
    for left, right in zip(ours, theirs, strict=True):
        assert (left.double() - right).norm() < 1e-5 * right.norm()


def test_a_graph_waits_for_nothing_and_keeps_what_it_reads(tier, monkeypatch):
    """During CUDA graph capture: if operands are at new addresses, the graph uploads their plan."""
    if OP.choose(()).name == "eager":
        return
    matrices = [pair(40, 33, 1, device=tier), pair(20, 10, 5, device=tier)]
    factors = [random(40, 5, device=tier), random(20, 5, device=tier)]
    expected = subspace_projections(matrices, factors)
    triton._plans.recent.clear()
    monkeypatch.setattr(plans, "is_captured", lambda _: True)
    with NobodyWaits():
        found = subspace_projections(matrices, factors)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.product, theirs.product)
        assert torch.equal(ours.product_gram, theirs.product_gram)
    if OP.choose(()).name == "triton":
        assert len({plan.table.data_ptr() for plan in triton._plans.captured}) == len(triton._plans.captured) >= 3
        assert not triton._plans.recent


class TestCuda:
    @pytest.fixture(autouse=True)
    def served(self, monkeypatch):
        emulated(monkeypatch)
        with served_by("cuda"):
            yield

    @staticmethod
    def launches():
        return [line.split()[1] for line in record() if line.startswith("cuLaunchKernel")]

    def test_modules_share_a_launch_each(self):
        matrices = [pair(*shape, dtype=torch.bfloat16) for shape in [(48, 96), (16, 16), (70, 33)]]
        check_products(
            matrices, [random(m[0].shape[0], 4) for m in matrices], [random(m[0].shape[1], 16) for m in matrices]
        )
        assert self.launches() == ["transposed_pair_bf16_16", "add_squares", "straight_pair_bf16_16", "add_squares"]

    def test_plans_are_kept_as_long_as_operands_stay(self):
        matrices, left = [pair(20, 20)], random(20, 4)
        first = transposed_products(matrices, [left])[0][0]
        assert torch.equal(transposed_products(matrices, [left])[0][0], first)
        assert cuda_runtime.runtime().plans == [1, 0]
        lefts = [random(20, 4) for _ in range(KEPT + 3)]
        for factor in lefts:
            transposed_products(matrices, [factor])
        assert cuda_runtime.runtime().plans == [KEPT, 0]

    @EVERY_DTYPE
    def test_weights_that_are_stored_transposed(self, dtype):
        turned = tuple(part.mT.contiguous().mT for part in pair(24, 40, dtype=DTYPES[dtype]))
        check_products([turned], [random(24, 8)], [random(40, 8)])
        assert [name.split("_")[0] for name in self.launches()] == ["straight", "add", "transposed", "add"]

    @pytest.mark.parametrize("rank", [3, 16, 32, 40])
    def test_ranks(self, rank):
        check_products([pair(40, 72)], [random(40, rank)], [random(72, rank)])

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_chunks_of_a_long_contraction_are_added(self, dtype):
        check_products([pair(1500, 24, dtype=DTYPES[dtype])], [random(1500, 4)], [random(24, 4)])
        check_products([pair(24, 1500, dtype=DTYPES[dtype])], [random(24, 4)], [random(1500, 4)])
        assert self.launches().count("add_chunks") == 2


def test_triton_plans():
    """The most recently used plans are kept; a tile fills a step of a tensor core."""
    (group,) = triton._groups([random(40, 1)], [random(40, 3)], [0])
    plan = group.plan(triton._transposed_plan)
    assert (plan.tile, plan.width) == (16, 16)
    for number in range(KEPT + 2):
        (group,) = triton._groups([random(40, 1 + number)], [random(40, 3)], [0])
        group.plan(triton._transposed_plan)
    assert len(triton._plans.recent) == KEPT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, left: (a, b[:, 1:], left), r"aligned_weight is \[37, 53\], but base_weight \[37, 52\]"),
        (lambda a, b, left: (a, b, left.mT), r"lora_b has 5 rows, but the weights have 37"),
        (lambda a, b, left: (a.double(), b, left), "float64"),
        (lambda a, b, left: (a, b, left[:, 0]), "must be a matrix"),
        (lambda a, b, left: (a, b.to("meta"), left), "base_weight is on meta, but lora_b on cpu"),
        (lambda a, b, left: (a, b, left.requires_grad_()), "no_grad"),
        (lambda a, b, left: (a.index_fill(0, torch.tensor([3]), float("nan")), b, left), "NaN"),
    ],
    ids=["columns", "rows", "dtype", "vector", "device", "gradient", "NaN"],
)
def test_what_does_not_fit_one_module_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        subspace_projection(*change(*pair(37, 53), random(37, 5)))


@pytest.mark.parametrize(
    ("matrices", "shapes", "message"),
    [
        ([random(4, 4)], [(4, 2), (4, 2)], "1 matrices and 2 factors"),
        ([random(4, 3)], [(5, 2)], r"module 0: the factor has 5 rows, but the matrix is \[4, 3\]"),
        ([(random(4, 3), random(3, 4))], [(4, 2)], r"module 0: \[4, 3\], \[3, 4\], \[4, 2\] are not matrices that fit"),
        ([random(4, 3), random(4, 3).to("meta")], [(4, 2), (4, 2)], "module 1 is not on cpu, where the first one is"),
    ],
    ids=["number", "rows", "pair", "device"],
)
def test_what_does_not_fit_is_refused(matrices, shapes, message):
    with pytest.raises(ValueError, match=message):
        subspace_projections(matrices, [random(*shape) for shape in shapes])
