"""Attaching defences to a model in training."""

from __future__ import annotations

from safelora_fast.training.defended import Defended, defend
from safelora_fast.training.window import Totals

__all__ = ["Defended", "Totals", "defend"]
