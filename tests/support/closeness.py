"""Tolerances: the allowed error is a few times that of plain torch in the same dtype on the same machine.

A constant tuned on one CPU fails on another, because math libraries sum in different orders and some terms cancel.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

FACTOR = 4  # chunks, fused kernels and scaled windows round a few times more often than one plain pass
LEAST = 4  # minimum tolerance in roundings of the dtype, for cases where plain torch happens to be exact
ROUNDINGS = 64  # float32 roundings allowed in a sum over tokens after a few layers; a wrong formula is off by far more


def rounded(value, *, size=None):
    """Return `pytest.approx(value)` with the tolerance of a float32 value that is computed in another order.

    Args:
        value: the expected value.
        size: size of the largest terms of the sum, if they cancel; by default the size of the value.
    """
    return pytest.approx(value, rel=0.0, abs=ROUNDINGS * 2**-24 * (abs(value) if size is None else size))


def losses(found, exact):
    """Return ‖found - exact‖ / ‖exact‖ of tensors or numbers by name, in float64."""
    assert found.keys() == exact.keys()
    pairs = {name: (_double(found[name]), _double(exact[name])) for name in exact}
    return {name: _ratio((ours - theirs).norm().item(), theirs.norm().item()) for name, (ours, theirs) in pairs.items()}


def assert_as_close_as_torch(ours, exact, plain, *, factor=FACTOR):
    """Check that the error of `ours` against the float64 oracle is at most `factor` times that of plain torch.

    Args:
        ours: the result under test: a number, a tensor, or a mapping of several.
        exact: the same in float64.
        plain: the same by plain torch in the dtype of `ours`. The largest error in a mapping counts for all its entries,
            because they belong to one computation.
        factor: allowed multiple of the plain error.
    """
    ours, exact, plain = (value if isinstance(value, Mapping) else {"value": value} for value in (ours, exact, plain))
    eps = max(torch.finfo(value.dtype).eps if torch.is_tensor(value) else 2**-23 for value in plain.values())
    allowed = factor * max([*losses(plain, exact).values(), LEAST * eps])
    for name, lost in losses(ours, exact).items():
        assert lost <= allowed, f"{name}: off by {lost:.3g}, {allowed:.3g} is allowed"


def _double(value):
    return value.detach().double() if torch.is_tensor(value) else torch.tensor(value, dtype=torch.float64)


def _ratio(difference, size):
    return difference / size if size else (0.0 if difference == 0 else float("inf"))
