"""How far a result may be from the exact one: a few times what plain torch in the same dtype loses on the same machine.

No constant tuned on one CPU serves on another: vendors' libraries add in other orders, and where terms cancel, that shows.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

FACTOR = 4  # chunks, fused kernels and scaled windows round a few times more often than one plain pass
LEAST = 4  # roundings of the dtype, where plain torch happens to be exact
ROUNDINGS = 64  # of float32, in a sum over tokens after a few layers; a wrong formula is off by far more


def rounded(value, *, size=None):
    """What a float32 number may be that is computed in another order.

    Args:
        value: the number.
        size: of the largest terms that it is the sum of, where they cancel; by default its own.
    """
    return pytest.approx(value, rel=0.0, abs=ROUNDINGS * 2**-24 * (abs(value) if size is None else size))


def losses(found, exact):
    """‖found - exact‖ / ‖exact‖ of tensors or numbers by name, in float64."""
    assert found.keys() == exact.keys()
    pairs = {name: (_double(found[name]), _double(exact[name])) for name in exact}
    return {name: _ratio((ours - theirs).norm().item(), theirs.norm().item()) for name, (ours, theirs) in pairs.items()}


def assert_as_close_as_torch(ours, exact, plain, *, factor=FACTOR):
    """Compare a float32 result with float64, by what plain torch in float32 loses.

    Args:
        ours: what is tested, a number or a tensor, or several by name.
        exact: the same in float64.
        plain: the same by plain torch, in the dtype of `ours`; of several the one that loses most counts for all, as they
            are gradients or values of one computation.
        factor: how many times that may be lost.
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
