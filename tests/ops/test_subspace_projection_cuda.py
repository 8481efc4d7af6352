"""The CUDA kernels of the projection, executed on the CPU with the tensor core's layout, against float64."""

from __future__ import annotations

import pytest
import torch
from emulated_cuda import emulated, record

from safelora_fast import _core
from safelora_fast.ops.subspace_projection import grouped_cuda, reference
from safelora_fast.ops.subspace_projection.cuda import subspace_projection
from safelora_fast.ops.subspace_projection.grouped_cuda import products, transposed_products
from safelora_fast.ops.subspace_projection.plans import KEPT

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["f32", "bf16", "f16"]


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    emulated(monkeypatch)
    grouped_cuda._plans.recent.clear()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(dtype, rows, columns, seed=0):
    base = random(rows, columns, seed=seed)
    return (base + 0.05 * random(rows, columns, seed=seed + 50)).to(dtype), base.to(dtype)


def v_of(matrix):
    return matrix[0].double() - matrix[1].double() if isinstance(matrix, tuple) else matrix.double()


def close(found, truth, tolerance=5e-7):
    assert (found.dtype, found.shape) == (torch.float32, truth.shape)
    assert truth.norm() > 1e-3
    assert (found.double() - truth).norm() <= tolerance * truth.norm()


def compare(matrices, left, right):
    """Both products, and ‖V‖² of pairs."""
    found, squares = transposed_products(matrices, left)
    for matrix, factor, ours, square in zip(matrices, left, found, squares, strict=True):
        close(ours, v_of(matrix).mT @ factor.double())
        truth = v_of(matrix).square().sum().item() if isinstance(matrix, tuple) else 0.0
        assert square.item() == pytest.approx(truth, rel=1e-6)
    for matrix, factor, ours in zip(matrices, right, products(matrices, right), strict=True):
        close(ours, v_of(matrix) @ factor.double())


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 32, 40])
@pytest.mark.parametrize("is_pair", [True, False], ids=["pair", "single"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_ranks(dtype, is_pair, rank):
    rows, columns = 40, 72
    matrix = pair(dtype, rows, columns) if is_pair else random(rows, columns).to(dtype)
    compare([matrix], [random(rows, rank, seed=1)], [random(columns, rank, seed=2)])


@pytest.mark.parametrize("shape", [(1, 1), (1, 65), (16, 64), (17, 7), (33, 130), (130, 33), (129, 300)])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_shapes(dtype, shape):
    rows, columns = shape
    compare([pair(dtype, rows, columns, seed=3)], [random(rows, 5, seed=1)], [random(columns, 5, seed=2)])


def test_many_modules_in_one_launch_each():
    shapes = [(48, 96), (16, 16), (70, 33), (96, 48)]
    ranks = [4, 16, 3, 8]
    matrices = [pair(torch.bfloat16, *shape, seed=index) for index, shape in enumerate(shapes)]
    left = [random(rows, rank, seed=rows) for (rows, _), rank in zip(shapes, ranks, strict=True)]
    right = [random(columns, rank, seed=columns) for (_, columns), rank in zip(shapes, ranks, strict=True)]
    compare(matrices, left, right)
    launches = [line.split()[1] for line in record() if line.startswith("cuLaunchKernel")]
    assert launches == ["transposed_pair_bf16_16", "add_squares", "straight_pair_bf16_16", "add_squares"]


def test_mixed_types_layouts_and_strides():
    turned = pair(torch.float16, 24, 40)
    turned = tuple(part.mT.contiguous().mT for part in turned)
    sliced = random(30, 90)[::2, 3:43]
    scattered = random(60, 40)[::3, ::2]
    matrices = [
        turned,
        (random(24, 40), random(24, 40, seed=5).bfloat16()),
        random(24, 40).bfloat16(),
        sliced,
        scattered,
    ]
    left = [random(7, 24, seed=1).mT, random(24, 7).half(), random(24, 7), random(15, 9)[:, 1:8], random(20, 7)]
    right = [random(40, 7), random(7, 40).mT, random(80, 7)[::2], random(40, 7).bfloat16(), random(20, 7)]
    compare(matrices, left, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_weights_that_are_stored_transposed(dtype):
    turned = tuple(part.mT.contiguous().mT for part in pair(dtype, 24, 40))
    compare([turned], [random(24, 8, seed=1)], [random(40, 8, seed=2)])
    launches = [line.split()[1].split("_")[0] for line in record() if line.startswith("cuLaunchKernel")]
    assert launches == ["straight", "add", "transposed", "add"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_chunks_of_a_long_contraction_are_added(dtype):
    compare([pair(dtype, 1500, 24)], [random(1500, 4, seed=1)], [random(24, 4)])
    compare([pair(dtype, 24, 1500)], [random(24, 4)], [random(1500, 4, seed=1)])
    assert sum("cuLaunchKernel add_chunks" in line for line in record()) == 2


def test_a_step_of_training_projects_onto_a_basis():
    basis = torch.linalg.qr(random(300, 64).double())[0].float()
    left = random(300, 32, seed=4)
    inner, _ = transposed_products([basis], [left])
    (projected,) = products([basis], inner)
    close(projected, basis.double() @ (basis.double().mT @ left.double()))
    gram, _ = transposed_products([left], [left])
    close(gram[0], left.double().mT @ left.double())


def test_what_lies_around_the_operands_is_not_read():
    rows, columns, rank = 21, 45, 6
    wide = [torch.full((rows + 20, columns + 27), float("nan"), dtype=torch.bfloat16) for _ in range(2)]
    whole = pair(torch.bfloat16, rows, columns)
    for around, part in zip(wide, whole, strict=True):
        around[3 : 3 + rows, 8 : 8 + columns] = part
    inside = (wide[0][3 : 3 + rows, 8 : 8 + columns], wide[1][3 : 3 + rows, 8 : 8 + columns])
    compare([inside], [random(rows, rank)], [random(columns, rank)])


def test_plans_are_kept_as_long_as_operands_stay():
    matrices, left = [pair(torch.float32, 20, 20)], [random(20, 4)]
    first, _ = transposed_products(matrices, left)
    plan = next(iter(grouped_cuda._plans.recent.values()))
    again, _ = transposed_products(matrices, left)
    assert list(grouped_cuda._plans.recent.values()) == [plan]
    assert torch.equal(first[0], again[0])
    for _ in range(KEPT + 3):
        left = [*left, random(20, 4)]
        transposed_products(matrices * len(left), left)
    assert len(grouped_cuda._plans.recent) == KEPT


@pytest.mark.parametrize("normalize", ["frobenius", "spectral"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_the_operation(dtype, normalize):
    (aligned, base), left = pair(dtype, 37, 53), random(37, 5).to(dtype)
    found = subspace_projection(aligned, base, left, normalize=normalize)
    truth = reference(aligned.double(), base.double(), left.double(), normalize=normalize)
    assert (found.dtype, found.shape) == (dtype, left.shape)
    tolerance = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    assert (found.double() - truth).norm() <= tolerance * truth.norm()
    assert torch.equal(subspace_projection(aligned, aligned.clone(), left, normalize=normalize), left)


def test_operands_that_no_plan_can_take():
    operand = ((16, 4), (16, 4), (4, 4), 16, 4)
    with pytest.raises(ValueError, match="a multiple of 16 bytes"):
        _core.CudaPlan([(*operand[:3], 24, 4)], form="straight", dtype="F32", is_pair=True)
    with pytest.raises(ValueError, match="a factor of 0 columns"):
        _core.CudaPlan([(*operand[:4], 0)], form="straight", dtype="F32", is_pair=True)
    with pytest.raises(ValueError, match="nothing to multiply"):
        _core.CudaPlan([], form="straight", dtype="F32", is_pair=True)
    with pytest.raises(ValueError, match="more than a kernel can count"):
        _core.CudaPlan([(*operand[:2], (1 << 40, 4), 16, 4)], form="straight", dtype="F32", is_pair=True)
