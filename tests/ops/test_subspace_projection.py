"""The public operation against plain torch in float64."""

from __future__ import annotations

import pytest
import torch

from safelora_fast.ops import subspace_projection
from safelora_fast.ops.subspace_projection import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(rows=37, columns=53, rank=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator)
    return (
        base + 0.3 * torch.randn(rows, columns, generator=generator),
        base,
        torch.randn(rows, rank, generator=generator),
    )


def close(found, aligned, base, left, normalize="frobenius"):
    truth = reference(aligned.double(), base.double(), left.double(), normalize=normalize)
    tolerance = max(1e-6, torch.finfo(found.dtype).eps if found.dtype != torch.float32 else 0)
    assert truth.norm() > 0.1
    assert (found.double() - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("normalize", ["frobenius", "spectral"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(dtype, normalize):
    aligned, base, left = operands()
    aligned, base, left = aligned.to(dtype), base.to(torch.bfloat16), left.to(dtype)
    found = subspace_projection(aligned, base, left, normalize=normalize)
    assert (found.dtype, found.shape) == (left.dtype, left.shape)
    close(found, aligned, base, left, normalize)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided B", "mixed"])
def test_any_strides(layout):
    aligned, base, left = operands()
    if layout == "transposed":
        aligned, base = aligned.mT.contiguous().mT, base.mT.contiguous().mT
    elif layout == "sliced":
        aligned, base = torch.cat([aligned, aligned], 1)[:, 53:], torch.cat([base, base])[:37]
    elif layout == "strided B":
        left = torch.randn(5, 74).mT[::2]
    else:
        aligned = aligned.mT.contiguous().mT
    close(subspace_projection(aligned, base, left), aligned, base, left)


@pytest.mark.parametrize("dtype", DTYPES)
def test_b_is_returned_where_v_is_zero(dtype):
    aligned, _, left = operands()
    found = subspace_projection(aligned, aligned.clone(), left.to(dtype))
    assert torch.equal(found, left.to(dtype))
    assert torch.equal(found, reference(aligned, aligned, left.to(dtype)))
    assert found.data_ptr() != left.data_ptr()


def test_inputs_stay_as_they_are():
    given = operands()
    before = [tensor.clone() for tensor in given]
    subspace_projection(*given)
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, left: (a, b[:, 1:], left), r"aligned_weight is \[37, 53\], but base_weight \[37, 52\]"),
        (lambda a, b, left: (a, b, left.mT), r"lora_b has 5 rows, but the weights have 37"),
        (lambda a, b, left: (a.double(), b, left), "float64"),
        (lambda a, b, left: (a, b, left[:, 0]), "must be a matrix"),
        (lambda a, b, left: (a, b, left.requires_grad_()), "no_grad"),
        (lambda a, b, left: (a.index_fill(0, torch.tensor([3]), float("nan")), b, left), "NaN"),
    ],
    ids=["columns", "rows", "dtype", "vector", "gradient", "NaN"],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        subspace_projection(*change(*operands()))
