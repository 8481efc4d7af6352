"""How many units one optimiser step has, over all its micro-batches and all processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.data.spans import Spans, read_spans
from safelora_fast.models.distributed import sum_over_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.defenses.base import BatchDefense


@dataclass(frozen=True)
class Totals:
    """The denominators of one optimiser step.

    Attributes:
        units: per defence, the units of the whole window and of all processes.
        labels: labels that the task loss counts, likewise.
        micro_batches: micro-batches of the window on each process.
    """

    units: Mapping[str, int]
    labels: int
    micro_batches: int


def count_totals(defenses: Sequence[BatchDefense], micro_batches: Sequence[Mapping[str, Any]]) -> Totals:
    """Count the units of a window of micro-batches over all processes. Collective."""
    return count_spans(defenses, [read_spans(batch) for batch in micro_batches])


def count_spans(defenses: Sequence[BatchDefense], window: Sequence[Spans]) -> Totals:
    """Count the units of a window whose spans have been read. Collective."""
    counts = [float(sum(defense.units(spans) for spans in window)) for defense in defenses]
    counts.append(float(sum(spans.labels for spans in window)))
    device = window[0].real.device if window else torch.device("cpu")
    *units, labels = (int(count) for count in sum_over_ranks(counts, device))
    return Totals(
        units=dict(zip((defense.name for defense in defenses), units, strict=True)),
        labels=labels,
        micro_batches=max(len(window), 1),
    )
