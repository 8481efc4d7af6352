from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from dense import SIZES, decode, encode, paper_operator, rounded

from safelora_fast import _core


class Block:
    """A matrix in memory with a stored dtype."""

    def __init__(self, values: np.ndarray, dtype: str, *, order: str = "C", pad: int = 0) -> None:
        self.dtype, self.shape = dtype, values.shape
        self.order = order
        laid = values if order == "C" else values.T
        framed = np.zeros((laid.shape[0], laid.shape[1] + pad))
        framed[:, : laid.shape[1]] = laid
        self.width = framed.shape[1]
        self.memory = np.frombuffer(bytearray(encode(framed, dtype)), dtype=np.uint8)

    @property
    def strides(self) -> tuple[int, int]:
        return (self.width, 1) if self.order == "C" else (1, self.width)

    @property
    def weight(self) -> tuple[int, str, int, int, int]:
        assert self.order == "C"
        return (self.memory.ctypes.data, self.dtype, *self.shape, self.width)

    @property
    def factor(self) -> tuple[int, str, int, int, int, int]:
        return (self.memory.ctypes.data, self.dtype, *self.shape, *self.strides)

    @property
    def values(self) -> np.ndarray:
        count = self.memory.nbytes // SIZES[self.dtype] // self.width
        framed = decode(self.memory.tobytes(), self.dtype, (count, self.width))
        laid = framed[:, : self.shape[1] if self.order == "C" else self.shape[0]]
        return laid if self.order == "C" else laid.T


def blocks(rng: np.random.Generator, m: int = 60, n: int = 90, r: int = 5, **options: Any) -> list[Block]:
    base = rng.standard_normal((m, n))
    aligned = base + 0.05 * rng.standard_normal((m, n))
    lora_b = rng.standard_normal((m, r))
    dtypes = options.get("dtypes", ("F32", "F32", "F32", "F32"))
    order, pad = options.get("order", "C"), options.get("pad", 0)
    if options.get("transposed"):
        aligned, base = aligned.T, base.T
    return [
        Block(aligned, dtypes[0], pad=pad),
        Block(base, dtypes[1], pad=pad),
        Block(lora_b, dtypes[2], order=order, pad=pad),
        Block(np.full((m, r), np.nan), dtypes[3], order=order, pad=pad),
    ]


@pytest.mark.parametrize("dtypes", [("F32",) * 4, ("BF16", "F32", "F16", "BF16"), ("F16", "BF16", "BF16", "F16")])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("normalize", ["frobenius", "spectral"])
def test_projection_in_memory(dtypes: tuple[str, ...], order: str, pad: int, transposed: bool, normalize: str) -> None:
    a, b, lora_b, output = blocks(np.random.default_rng(1), dtypes=dtypes, order=order, pad=pad, transposed=transposed)
    v = (a.values.astype(np.float32) - b.values.astype(np.float32)).astype(np.float64)
    v = v.T if transposed else v
    norm = _core.subspace_projection(
        a.weight, b.weight, lora_b.factor, output.factor, normalize=normalize, transposed=transposed
    )
    operator = paper_operator(v) if normalize == "frobenius" else v @ v.T / np.linalg.norm(v, 2) ** 2
    expected = operator @ lora_b.values
    assert norm == pytest.approx(np.linalg.norm(v), rel=1e-6)
    error = np.linalg.norm(output.values - rounded(expected, output.dtype))
    assert error <= (1e-5 + {"F32": 0, "F16": 2.0**-11, "BF16": 2.0**-8}[output.dtype]) * np.linalg.norm(expected)


def test_output_may_be_lora_b_itself() -> None:
    a, b, lora_b, output = blocks(np.random.default_rng(2))
    _core.subspace_projection(a.weight, b.weight, lora_b.factor, output.factor)
    _core.subspace_projection(a.weight, b.weight, lora_b.factor, lora_b.factor)
    assert lora_b.memory.tobytes() == output.memory.tobytes()


def test_equal_weights_give_zero() -> None:
    a, _, lora_b, output = blocks(np.random.default_rng(3))
    assert _core.subspace_projection(a.weight, a.weight, lora_b.factor, output.factor) == 0
    assert not output.values.any()


def test_thread_count_does_not_change_a_bit() -> None:
    a, b, lora_b, output = blocks(np.random.default_rng(4), m=150, n=300)
    results = []
    for threads in (1, 2, 3, 7):
        _core.subspace_projection(a.weight, b.weight, lora_b.factor, output.factor, threads=threads)
        results.append(output.memory.tobytes())
    assert len(set(results)) == 1


def test_bad_specifications_are_refused() -> None:
    a, b, lora_b, output = blocks(np.random.default_rng(5))
    address = output.memory.ctypes.data

    def run(
        aligned: Any = a.weight,
        base: Any = b.weight,
        given: Any = lora_b.factor,
        target: Any = output.factor,
        **options: Any,
    ) -> float:
        return _core.subspace_projection(aligned, base, given, target, **options)

    with pytest.raises(ValueError, match="aligned is F64"):
        run((a.weight[0], "F64", *a.weight[2:]))
    with pytest.raises(ValueError, match="base is no 60x90 matrix"):
        run(base=(0, *b.weight[1:]))
    with pytest.raises(ValueError, match="aligned: a 60x90 F32 matrix with row stride 3"):
        run((*a.weight[:4], 3))
    with pytest.raises(ValueError, match="aligned is 60x90 but base is 60x80"):
        run(base=(*b.weight[:3], 80, 90))
    with pytest.raises(ValueError, match="lora_b is 60x5 but output is 60x4"):
        run(target=(address, "F32", 60, 4, 5, 1))
    with pytest.raises(ValueError, match="lora_b has 60 rows but V has 90"):
        run(transposed=True)
    with pytest.raises(ValueError, match="elements of output share memory"):
        run(target=(address, "F32", 60, 5, 1, 1))
    with pytest.raises(ValueError, match="output shares memory with a weight"):
        run(target=(a.weight[0], "F32", 60, 5, 5, 1))
    with pytest.raises(ValueError, match="is no 9223372036854775807x5 matrix"):
        run(given=(lora_b.factor[0], "F32", 2**63 - 1, 5, 5, 1))
    assert np.isnan(output.values).all()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_refused(which: int) -> None:
    given = blocks(np.random.default_rng(6))
    given[which].memory.view(np.float32)[7] = np.nan
    with pytest.raises(
        ValueError, match="lora_b holds NaN at row 1, column 2" if which == 2 else "holds NaN or infinity"
    ):
        _core.subspace_projection(given[0].weight, given[1].weight, given[2].factor, given[3].factor)


def test_a_forked_child_makes_threads_of_its_own() -> None:
    a, b, lora_b, output = blocks(np.random.default_rng(7))
    _core.subspace_projection(a.weight, b.weight, lora_b.factor, output.factor, threads=2)
    expected = output.memory.tobytes()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            output.memory[:] = 0
            _core.subspace_projection(a.weight, b.weight, lora_b.factor, output.factor, threads=2)
            code = 0 if output.memory.tobytes() == expected else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
