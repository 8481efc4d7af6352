"""Defences that act on the data: safe rows among the task's rows, which safe rows, and a prompt in training only."""

from __future__ import annotations

from safelora_fast.data.inoculate import inoculate
from safelora_fast.data.interleave import SAFE, interleave

__all__ = ["SAFE", "inoculate", "interleave"]
