"""Reading and tokenizing examples, and the two defenses that act on data: interleaving and inoculation."""

from __future__ import annotations

from safelora_fast.data.inoculate import inoculate
from safelora_fast.data.interleave import SAFE, interleave

__all__ = ["SAFE", "inoculate", "interleave"]
