"""What acts on a model while it is fine-tuned, or watches it: one file each."""

from __future__ import annotations

from safelora_fast.defenses.base import BatchDefense, Defense
from safelora_fast.defenses.drift_monitor import DriftMonitor
from safelora_fast.defenses.feature_distance import FeatureDistance
from safelora_fast.defenses.kl import KL
from safelora_fast.defenses.safelora import SafeLora
from safelora_fast.defenses.steering import Steering
from safelora_fast.defenses.subspace_penalty import SubspacePenalty

__all__ = [
    "KL",
    "BatchDefense",
    "Defense",
    "DriftMonitor",
    "FeatureDistance",
    "SafeLora",
    "Steering",
    "SubspacePenalty",
]
