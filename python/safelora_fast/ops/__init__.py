"""Operations on torch tensors, to use in your own training code. Importing this package imports torch."""

from __future__ import annotations

from importlib.util import find_spec

from safelora_fast.errors import MissingDependencyError, how_to_install

if find_spec("torch") is None:
    raise MissingDependencyError(f"safelora_fast.ops needs torch: {how_to_install('train')}")

# Bind the functions now: later, the folder of the same name would hide a function.
from safelora_fast.ops.feature_distance import OP as FEATURE_DISTANCE
from safelora_fast.ops.feature_distance import feature_distance
from safelora_fast.ops.linear_kl import OP as LINEAR_KL
from safelora_fast.ops.linear_kl import linear_kl, linear_kl_cross_entropy
from safelora_fast.ops.subspace_projection import OP as SUBSPACE_PROJECTION
from safelora_fast.ops.subspace_projection import subspace_projection, subspace_projections

__all__ = ["feature_distance", "linear_kl", "linear_kl_cross_entropy", "subspace_projection", "subspace_projections"]

OPS = (FEATURE_DISTANCE, LINEAR_KL, SUBSPACE_PROJECTION)
