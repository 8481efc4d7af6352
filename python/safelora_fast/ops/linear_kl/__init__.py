"""KL divergence between two models that share an output head, from their hidden states."""

from __future__ import annotations

from safelora_fast.ops.linear_kl.fused import linear_kl
from safelora_fast.ops.linear_kl.reference import linear_kl_reference

__all__ = ["linear_kl", "linear_kl_reference"]
