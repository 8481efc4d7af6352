"""Feature distance between the hidden states of two models (LDIFS)."""

from __future__ import annotations

from safelora_fast.ops.feature_distance.eager import feature_distance
from safelora_fast.ops.feature_distance.reference import feature_distance_reference

__all__ = ["feature_distance", "feature_distance_reference"]
