"""What is no tensor is refused by name, in one line; so is a machine without torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from safelora_fast.errors import how_to_install
from safelora_fast.ops import (
    feature_distance,
    linear_kl,
    linear_kl_cross_entropy,
    subspace_projection,
    subspace_projections,
)

STATES, HEAD, MASK, LABELS = torch.ones(1, 3, 4), torch.ones(5, 4), torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 3)
MATRIX = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: subspace_projection(MATRIX, MATRIX.numpy(), MATRIX),
            r"base_weight is a numpy\.ndarray.*from_numpy\(base_weight\)",
        ),
        (lambda: subspace_projection(MATRIX, MATRIX, [[1.0]]), r"lora_b is a list.*torch\.as_tensor\(lora_b\)"),
        (lambda: subspace_projections([(MATRIX, MATRIX.numpy())], [MATRIX]), r"operands\[1\] is a numpy\.ndarray"),
        (lambda: feature_distance([STATES.numpy()], [STATES], MASK), r"features\[0\] is a numpy\.ndarray"),
        (lambda: feature_distance([STATES], [STATES], MASK.numpy()), r"mask is a numpy\.ndarray"),
        (lambda: feature_distance(STATES.numpy(), [STATES], MASK), r"features is a ndarray: it must be a list"),
        (lambda: linear_kl(STATES, STATES.numpy(), HEAD, MASK), r"reference_hidden is a numpy\.ndarray"),
        (lambda: linear_kl(STATES, STATES, np.ones((5, 4)), MASK), r"head_weight is a numpy\.ndarray"),
        (
            lambda: linear_kl_cross_entropy(
                STATES, STATES, HEAD, MASK.numpy(), LABELS, kl_weight=1.0, cross_entropy_weight=1.0
            ),
            r"mask is a numpy\.ndarray",
        ),
    ],
)
def test_an_array_where_a_tensor_belongs(call, message):
    with pytest.raises(TypeError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_operations_without_torch():
    """A process of its own: torch cannot be forgotten once it is imported."""
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from safelora_fast.errors import MissingDependencyError\n"
        "try:\n    import safelora_fast.ops\n"
        "except MissingDependencyError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"safelora_fast.ops needs torch: {how_to_install('train')}\n"
