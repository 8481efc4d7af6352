"""KL divergence between two models that share an output head, from their hidden states; with or without cross-entropy."""

from __future__ import annotations

from safelora_fast.ops.linear_kl import library
from safelora_fast.ops.linear_kl.chunked import SharedLoss, TokenFigures
from safelora_fast.ops.linear_kl.fused import linear_kl, linear_kl_cross_entropy
from safelora_fast.ops.linear_kl.reference import cross_entropy_reference, linear_kl_reference

__all__ = [
    "SharedLoss",
    "TokenFigures",
    "cross_entropy_reference",
    "library",
    "linear_kl",
    "linear_kl_cross_entropy",
    "linear_kl_reference",
]
