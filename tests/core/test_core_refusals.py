"""Errors of the extension module's jobs: values that are not finite, views that leave their tensor, bad settings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from dense import module, whole, write

from safelora_fast import _core
from safelora_fast.errors import AdapterError, CheckpointError, PairingError, SettingsError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["aligned", "base", "B", "A"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_nan_and_inf_are_found(tmp_path: Path, side: str, value: float, dtype: str, transposed: bool) -> None:
    given = module(
        tmp_path, np.random.default_rng(19), weight_dtypes=(dtype, dtype), dtype=dtype, transposed=transposed
    )
    name, tensor = ("adapter0", side) if side in "AB" else (side, "part0")
    path = tmp_path / f"{name}.safetensors"
    kind, shape, begin, _ = _core.SafetensorsFile(str(path)).tensors[tensor]
    row, col = shape[0] - 1, shape[1] - 2
    size = {"F32": 4, "BF16": 2, "F16": 2}[kind]
    codes = {
        "F32": np.float32(value).tobytes(),
        "BF16": np.float32(value).tobytes()[2:],
        "F16": np.float16(value).tobytes(),
    }
    content = bytearray(path.read_bytes())
    start = begin + (row * shape[1] + col) * size
    content[start : start + size] = codes[kind]
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=f'{name}.safetensors: tensor "{tensor}" holds .* row {row}, column {col};'
    ):
        given.run()


def test_views_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(20)
    tensors = {
        "a": ("F32", rng.standard_normal((4, 6))),
        "b": ("F32", rng.standard_normal((4, 5))),
        "A": ("F32", rng.standard_normal((2, 6))),
        "B": ("F32", rng.standard_normal((4, 2))),
        "B3": ("F32", rng.standard_normal((4, 3))),
    }
    file = write(tmp_path / "x.safetensors", tensors)
    a, b, right, left, wider = (whole(file, name) for name in tensors)
    with pytest.raises(PairingError, match="4x6 but base is 4x5"):
        _core.Part(a, b)
    with pytest.raises(PairingError, match="elements apart"):
        _core.Part(*2 * [_core.View(file, "a", rows=4, cols=3, row_stride=6, col_stride=2)])
    with pytest.raises(AdapterError, match="B3 has rank 3 but A has rank 2"):
        _core.Factors(wider, right)
    with pytest.raises(PairingError, match="module m: A has 6 columns but the weight has 5"):
        _core.Job("m", [_core.Part(b, b)], [_core.Factors(left, right)])
    with pytest.raises(PairingError, match="module m: B has 4 rows but the weight has 6"):
        _core.Job("m", [_core.Part(a, a)], [_core.Factors(left, right)], transposed=True)
    with pytest.raises(PairingError, match="no weights"):
        _core.Job("m", [], [])
    with pytest.raises(PairingError, match="b has 5 columns, the first part 6"):
        _core.Job("m", [_core.Part(a, a), _core.Part(b, b)], [])


@pytest.mark.parametrize(
    ("layout", "fits"),
    [
        ({"rows": 4, "cols": 6, "row_stride": 6}, True),
        ({"rows": 4, "cols": 6, "row_stride": 6, "offset": 1}, False),
        ({"rows": 4, "cols": 6, "row_stride": 7}, False),
        ({"rows": 6, "cols": 4, "row_stride": 1, "col_stride": 6}, True),
        ({"rows": 1, "cols": 1, "row_stride": 2**62, "col_stride": 2**62, "offset": 23}, True),
        ({"rows": 2, "cols": 1, "row_stride": 2**63}, False),
        ({"rows": 2**33, "cols": 1, "row_stride": 2**33}, False),
        ({"rows": 1, "cols": 1, "row_stride": 1, "offset": 24}, False),
        ({"rows": 1, "cols": 1, "row_stride": 1, "offset": 2**64 - 1}, False),
        ({"rows": 0, "cols": 1, "row_stride": 1}, False),
    ],
)
def test_views_stay_in_their_tensor(tmp_path: Path, layout: dict, fits: bool) -> None:
    file = write(tmp_path / "x.safetensors", {"a": ("F32", np.ones((4, 6))), "after": ("F32", np.ones((9, 9)))})
    if fits:
        assert _core.View(file, "a", **layout).nbytes == 4 * layout["rows"] * layout["cols"]
    else:
        with pytest.raises(CheckpointError, match=r'tensor "a" of shape \[4, 6\] does not hold'):
            _core.View(file, "a", **layout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either rank or energy"),
        ({"rank": 3, "energy": 0.5}, "either rank or energy"),
        ({"rank": 0}, "rank is 0"),
        ({"energy": 0.0}, "energy is 0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"energy": math.nan}, "energy is NaN"),
    ],
)
def test_an_operator_needs_a_rank_or_an_energy(options: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        _core.Operator.orthogonal(**options)


def test_a_stream_needs_a_thread() -> None:
    with pytest.raises(SettingsError, match="threads is 0"):
        _core.ProjectionStream([], _core.Operator.zero(), threads=0)
