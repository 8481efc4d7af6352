"""Selecting safe examples to interleave, by how misaligned models differ from the aligned one (Interleaving+, ++)."""

from __future__ import annotations

from safelora_fast.selection.report import Selection
from safelora_fast.selection.select import select_by_perplexity_gap

__all__ = ["Selection", "select_by_perplexity_gap"]
