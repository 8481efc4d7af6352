"""The result of a selection as an object, as text and as a plot."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from safelora_fast.plotting import COLORS, mark_line, plot_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

BINS = 24
BAR = 40


@dataclass(frozen=True)
class Selection:
    """The outcome of :func:`~safelora_fast.select_by_perplexity_gap`.

    Attributes:
        source: the candidates file.
        sha256: digest of the file.
        rows: number of candidates in the file.
        adapters: SHA-256 of each misaligned adapter used, by name.
        held_out: names of the adapters that were left out.
        epsilon: ε of the score.
        scores: scores of the scored candidates, in file order, float64.
        chosen: file indices of the chosen candidates, highest score first.
        cut: the lowest chosen score.
        refusals: number of refusals that were left out.
        skipped: places of candidates without a score, by reason.
        warnings: warnings for the user.
        trained_on: SHA-256 of each adapter's training data, by name, if its folder records it.
    """

    source: str
    sha256: str
    rows: int
    adapters: Mapping[str, str]
    held_out: tuple[str, ...]
    epsilon: float
    scores: np.ndarray
    chosen: np.ndarray
    cut: float
    refusals: int
    skipped: Mapping[str, list[str]]
    warnings: tuple[str, ...] = ()
    trained_on: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        count = f"{len(self.chosen)} of {len(self.scores)} scored examples"
        return f"Selection({count}, cut={self.cut:.4g}, adapters={list(self.adapters)}, source={self.source!r})"

    def histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (counts, edges) of the scores; the outer bins include all scores outside the middle 99.8 %."""
        return histogram(self.scores)

    def lines(self) -> list[str]:
        """Return the histogram as lines of text, with the cut marked."""
        return histogram_lines(self.scores, self.cut, "cut")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values; skipped candidates as their number and the first place."""
        counts, edges = self.histogram()
        return {
            "source": self.source,
            "sha256": self.sha256,
            "rows": self.rows,
            "scored": len(self.scores),
            "chosen": len(self.chosen),
            "cut": self.cut,
            "epsilon": self.epsilon,
            "adapters": dict(self.adapters),
            "trained_on": dict(self.trained_on),
            "held_out": list(self.held_out),
            "refusals": self.refusals,
            "skipped": {reason: {"rows": len(places), "first": places[0]} for reason, places in self.skipped.items()},
            "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
            "warnings": list(self.warnings),
        }


def histogram(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (counts, edges); the outer bins include all values outside the middle 99.8 %."""
    low, high = np.quantile(values, [0.001, 0.999])
    edges = np.linspace(low, high, BINS + 1) if high > low else np.array([low, low + 1e-9])
    counts, _ = np.histogram(np.clip(values, low, edges[-1]), bins=edges)
    return counts, edges


def histogram_lines(values: np.ndarray, mark: float, label: str) -> list[str]:
    """Return the histogram as lines of text, highest first, with a label at the bin of `mark`; an infinite mark has none."""
    counts, edges = histogram(values)
    most = max(int(counts.max()), 1)
    result = []
    for number in range(len(counts) - 1, -1, -1):
        low, high = edges[number], edges[number + 1]
        last = number == len(counts) - 1
        told = f" ← {label}" if low <= mark < high or (last and high <= mark < math.inf) else ""
        bar = "█" * -(-BAR * int(counts[number]) // most)
        result.append(f"{low:+9.4f} {bar:<{BAR}} {counts[number]:,}{told}")
    return result


def plot_selection(selection: Selection, path: Path) -> None:
    """Draw the histogram of the scores.

    Raises:
        MissingDependencyError, OutputError: as :func:`~safelora_fast.plotting.plot_file`.
    """
    counts, edges = selection.histogram()
    with plot_file(path, 7, 4) as figure:
        axes = figure.add_subplot()
        axes.stairs(counts, edges, fill=True, color=COLORS[0])
        mark_line(axes, selection.cut, f"{len(selection.chosen):,} chosen", vertical=True, color=COLORS[5])
        axes.set_xlabel("(mean NLL of misaligned models − NLL of the aligned one)/(NLL of the aligned one + ε)")
        axes.set_ylabel("examples")
