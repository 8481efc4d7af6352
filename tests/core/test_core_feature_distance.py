"""Errors for bad arguments: everything about memory that can be checked from addresses, shapes and strides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from safelora_fast import _core
from safelora_fast.errors import SettingsError

SHAPE = (2, 3, 5)
STRIDES = (15, 5)


@pytest.fixture
def memory() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "features": generator.standard_normal(SHAPE, dtype=np.float32),
        "reference": generator.standard_normal(SHAPE, dtype=np.float32),
        "mask": np.ones(SHAPE[:2], dtype=np.uint8),
        "segments": np.zeros(SHAPE[:2], dtype=np.int64),
        "factors": np.full((2, *SHAPE[:2], 2), np.nan),
        "output": np.full(SHAPE, np.nan, dtype=np.float32),
    }


def address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def spec(array: np.ndarray, **changes: Any) -> Any:
    given = {"address": address(array), "dtype": "F32", "shape": SHAPE, "strides": STRIDES, **changes}
    return tuple(given.values())


def distance(memory: dict[str, np.ndarray], **changes: Any) -> float:
    given = {
        "features": [spec(memory["features"])],
        "reference": [spec(memory["reference"])],
        "mask": (address(memory["mask"]), (3, 1)),
        "segments": (address(memory["segments"]), (3, 1)),
        "factors": address(memory["factors"]),
        **changes,
    }
    return _core.feature_distance(**given)


def gradient(memory: dict[str, np.ndarray], **changes: Any) -> None:
    given = {
        "features": [spec(memory["features"])],
        "reference": [spec(memory["reference"])],
        "factors": [address(memory["factors"])],
        "outputs": [address(memory["output"])],
        "weight": 1.0,
        **changes,
    }
    _core.feature_distance_gradient(**given)


def test_the_plain_difference(memory: dict[str, np.ndarray]) -> None:
    d = memory["features"].astype(np.float64) - memory["reference"]
    assert distance(memory, normalize="none") == pytest.approx((d**2).sum() / 2, rel=1e-7)
    gradient(memory)
    assert memory["output"] == pytest.approx(d, rel=1e-6)


def test_the_mask_may_hold_any_byte(memory: dict[str, np.ndarray]) -> None:
    expected = distance(memory)
    memory["mask"][:] = 255
    assert distance(memory) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "F64"}, "features is F64; use F32, BF16 or F16"),
        ({"dtype": "BF16"}, r"features are \[2, 3, 5\] Bf16 but the reference is \[2, 3, 5\] F32"),
        ({"shape": (2, 3, 4)}, r"features are \[2, 3, 4\] F32 but the reference is \[2, 3, 5\] F32"),
        ({"shape": (2**62, 2**62, 5)}, "features at address 0x[0-9a-f]+ is larger than memory"),
        ({"strides": (2**62, 5)}, "features at address 0x[0-9a-f]+ is larger than memory"),
        ({"address": 2**64 - 4}, "features at address 0x[0-9a-f]+ is larger than memory"),
        ({"address": 0}, "features cannot lie at address 0x0"),
    ],
)
def test_bad_states_are_refused(memory: dict[str, np.ndarray], changes: dict[str, Any], message: str) -> None:
    features = [spec(memory["features"], **changes)]
    with pytest.raises(ValueError, match=message):
        distance(memory, features=features)
    with pytest.raises(ValueError, match=message):
        gradient(memory, features=features)
    assert np.isnan(memory["factors"]).all()
    assert np.isnan(memory["output"]).all()


def test_bad_companions_are_refused(memory: dict[str, np.ndarray]) -> None:
    blocks = [spec(memory["features"])]
    with pytest.raises(ValueError, match="there is no block of features"):
        distance(memory, features=[], reference=[])
    with pytest.raises(ValueError, match="1 blocks of features and 2 of reference features"):
        distance(memory, reference=blocks * 2)
    shorter = [spec(memory["features"]), spec(memory["features"], shape=(1, 3, 5))]
    with pytest.raises(ValueError, match="a block has 3 tokens, the mask 6"):
        distance(memory, features=shorter, reference=shorter)
    with pytest.raises(ValueError, match="mask cannot lie at address 0x0"):
        distance(memory, mask=(0, (3, 1)))
    with pytest.raises(ValueError, match=r"mask at address 0x[0-9a-f]+ is larger than memory"):
        distance(memory, mask=(1, (2**63, 2**63)))
    with pytest.raises(ValueError, match=r"segments cannot lie at address 0x[0-9a-f]+"):
        distance(memory, segments=(address(memory["segments"]) + 1, (3, 1)))
    with pytest.raises(ValueError, match=r"factors cannot lie at address 0x[0-9a-f]+"):
        distance(memory, factors=address(memory["factors"]) + 4)
    with pytest.raises(ValueError, match='normalize is "row"; use "sequence", "token" or "none"'):
        distance(memory, normalize="row")
    with pytest.raises(SettingsError, match="threads is 0"):
        distance(memory, threads=0)
    with pytest.raises(ValueError, match="1 blocks, but 0 factors and 1 outputs"):
        gradient(memory, factors=[])
    with pytest.raises(ValueError, match="output 0 shares memory with another tensor"):
        gradient(memory, outputs=[address(memory["reference"]) + 4 * 29])
    with pytest.raises(ValueError, match="output 0 shares memory with another tensor"):
        gradient(memory, outputs=[address(memory["factors"])])
    with pytest.raises(ValueError, match="output 1 shares memory with another tensor"):
        gradient(
            memory,
            features=blocks * 2,
            reference=blocks * 2,
            factors=[address(memory["factors"])] * 2,
            outputs=[address(memory["output"]), address(memory["output"]) + 4],
        )
    assert np.isnan(memory["factors"]).all()
    assert np.isnan(memory["output"]).all()
