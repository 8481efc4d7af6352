"""Operations on torch tensors, for people who embed them; each folder has its plain reference beside the operation.

Importing this package imports torch. The functions are bound here at once: a name bound later would be hidden by the
folder of the same name.
"""

from __future__ import annotations

from importlib.util import find_spec

from safelora_fast.errors import MissingDependencyError, how_to_install

if find_spec("torch") is None:
    raise MissingDependencyError(f"safelora_fast.ops needs torch: {how_to_install('train')}")

from safelora_fast.ops.feature_distance import feature_distance
from safelora_fast.ops.linear_kl import linear_kl, linear_kl_cross_entropy
from safelora_fast.ops.subspace_projection import subspace_projection, subspace_projections

__all__ = ["feature_distance", "linear_kl", "linear_kl_cross_entropy", "subspace_projection", "subspace_projections"]
