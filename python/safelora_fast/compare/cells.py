"""Cells from what the seeds came to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from safelora_fast.compare.columns import DIVERGENCE
from safelora_fast.compare.pooling import pool
from safelora_fast.compare.report import Cell, Column, SeedValue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.compare.pooling import Outcome


def cell_of(column: Column, samples: Sequence[Outcome], values: Sequence[SeedValue], count: str = "") -> Cell:
    """Mean and interval over seeds and items.

    Args:
        column: the intervals of a share and of a divergence are others than that of a mean.
        samples: of the seeds that have a figure.
        values: of all seeds.
        count: what the figure is a share of, in words.
    """
    pooled = pool(samples, share=column.unit == "%", never_negative=column.key == DIVERGENCE)
    low, high = pooled.interval.to_list()
    return Cell(None if math.isnan(pooled.value) else pooled.value, low, high, tuple(values), count)


def mean_cell(values: Sequence[SeedValue]) -> Cell:
    """Mean over seeds, of figures that have no items."""
    known = [value.value for value in values if value.value is not None]
    return Cell(sum(known) / len(known) if known else None, None, None, tuple(values))
