"""The result of a screen: the distribution of each measure, the highest examples, and the share beyond a limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from safelora_fast.data.rows import top_k
from safelora_fast.scoring.intervals import Interval, student_quantile
from safelora_fast.selection.report import histogram, histogram_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.data.rows import Row
    from safelora_fast.selection.candidates import Candidates

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SHOWN = 160  # characters of a completion


@dataclass(frozen=True)
class Worst:
    """One of the examples with the highest values: its place in the file, its value, and the start of its completion."""

    place: str
    value: float
    completion: str


@dataclass(frozen=True)
class Measured:
    """One measure of all scored examples. High values are suspicious.

    Attributes:
        name: the trait, or "gap".
        kind: what is measured, in words.
        values: [examples] float64, in file order.
        worst: the highest, highest first.
        limit: values above it are flagged; None if nothing is.
        most: the share of examples that may be flagged.
    """

    name: str
    kind: str
    values: np.ndarray
    worst: tuple[Worst, ...]
    limit: float | None
    most: float

    @property
    def mean(self) -> float:
        """The mean over the examples."""
        return float(self.values.mean())

    @property
    def interval(self) -> Interval:
        """The 95 % interval of the mean, by Student's t; NaN ends for one example."""
        count = len(self.values)
        if count < 2:
            return Interval(math.nan, math.nan)
        half = student_quantile(count - 1) * float(self.values.std(ddof=1)) / math.sqrt(count)
        return Interval(self.mean - half, self.mean + half)

    @property
    def flagged(self) -> int:
        """Number of examples above the limit."""
        return 0 if self.limit is None else int((self.values > self.limit).sum())

    @property
    def passes(self) -> bool:
        """Whether at most the allowed share of the examples is flagged."""
        return self.flagged <= self.most * len(self.values)

    def lines(self) -> list[str]:
        """Return the measure as text."""
        low, high = self.interval.low, self.interval.high
        count = len(self.values)
        found = [
            f"{self.name}, {self.kind}: mean {self.mean:+.4g} ({low:+.4g} to {high:+.4g}) over {count:,} examples",
            *histogram_lines(self.values, math.inf if self.limit is None else self.limit, "limit"),
        ]
        found += [f"{one.value:+9.4f} {one.place}: {one.completion}" for one in self.worst]
        if self.limit is not None:
            verdict = "passes" if self.passes else "fails"
            share = f"{self.flagged:,} of {count:,} ({100 * self.flagged / count:.3g} %)"
            found.append(f"above {self.limit:g}: {share}, at most {100 * self.most:g} %: {verdict}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the measure as plain values."""
        counts, edges = histogram(self.values)
        quantiles = np.quantile(self.values, QUANTILES).tolist()
        return {
            "kind": self.kind,
            "count": len(self.values),
            "mean": self.mean,
            "interval": self.interval.to_list(),
            "quantiles": {f"{share:g}": value for share, value in zip(QUANTILES, quantiles, strict=True)},
            "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
            "limit": self.limit,
            "flagged": self.flagged,
            "most": self.most,
            "passes": self.passes,
            "worst": [vars(one) for one in self.worst],
        }


@dataclass(frozen=True)
class Screen:
    """The outcome of :func:`~safelora_fast.screening.screen.screen`.

    Attributes:
        source: the file.
        sha256: its digest.
        examples: number of examples in the file.
        settings: what the values depend on.
        measures: in order; the vectors', then "gap".
        skipped: places of examples without values, by reason.
    """

    source: str
    sha256: str
    examples: int
    settings: Mapping[str, Any]
    measures: tuple[Measured, ...]
    skipped: Mapping[str, Sequence[str]]

    @property
    def passes(self) -> bool:
        """Whether no measure has too many flagged examples."""
        return all(measure.passes for measure in self.measures)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values; skipped examples as their number and the first place."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "examples": self.examples,
            "passes": self.passes,
            "measures": {measure.name: measure.to_dict() for measure in self.measures},
            "skipped": {reason: {"rows": len(places), "first": places[0]} for reason, places in self.skipped.items()},
            "settings": dict(self.settings),
        }


def worst_of(values: np.ndarray, indices: Sequence[int], examples: Candidates, count: int) -> tuple[Worst, ...]:
    """Return the highest values, highest first; ties go to the earlier example.

    Args:
        values: one for each scored example.
        indices: their indices in the file.
        examples: the file.
        count: how many to return.
    """
    return tuple(
        Worst(examples.place(indices[number]), float(values[number]), _start(examples.row(indices[number])))
        for number in top_k(values, count).tolist()
    )


def _start(row: Row) -> str:
    text = row.completion
    if not isinstance(text, str):
        text = next((turn["content"] for turn in reversed(text) if turn["role"] == "assistant"), "")
    words = " ".join(text.split())
    return words if len(words) <= SHOWN else f"{words[: SHOWN - 1]}…"
