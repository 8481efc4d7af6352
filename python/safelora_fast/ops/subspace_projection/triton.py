"""The projection of one module by Triton."""

from __future__ import annotations

from functools import partial

from safelora_fast.ops.subspace_projection import grouped_triton, single
from safelora_fast.ops.triton_runtime import refusal

__all__ = ["refusal", "subspace_projection"]

subspace_projection = partial(single.subspace_projection, grouped_triton)
