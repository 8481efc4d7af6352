"""One figure from several seeds, with an interval that knows of both sources of chance: the items and the seeds.

Every seed is measured on the same items (answers, pairs, problems), and items come in clusters (themes, questions). The
variance of the mean over seeds is taken as the sum of two: that of the clusters, each averaged over seeds, and that
of the seeds' own figures. Degrees of freedom are Satterthwaite's (1946). With one seed the second is not known, and the
interval is one of the items alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from safelora_fast.scoring.intervals import NOTHING, Interval, student_quantile, wilson

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence


@dataclass(frozen=True)
class Sample:
    """What one run came to, item by item: its figure is Σ values / Σ weights.

    Attributes:
        values: of each item, e.g. the loss of an answer in nats, or 1 for a hit.
        weights: of each item, e.g. the answer's tokens, or 1.
        clusters: the cluster of each item.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...]
    clusters: tuple[str, ...]

    @property
    def figure(self) -> float:
        """Mean per unit of weight; NaN without items."""
        total = sum(self.weights)
        return sum(self.values) / total if total else math.nan

    def within(self, clusters: Collection[str]) -> Sample:
        """The items of some clusters."""
        places = [place for place, name in enumerate(self.clusters) if name in clusters]
        values, weights, names = (
            tuple(some[place] for place in places) for some in (self.values, self.weights, self.clusters)
        )
        return Sample(values, weights, names)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Summary:
    """What one run came to where the items are not known, only how far chance among them may carry the figure.

    Attributes:
        figure: the mean over items.
        error: its standard error; NaN where it is not known, and then there is no interval.
        count: of items.
    """

    figure: float
    error: float
    count: int

    def minus(self, other: Summary) -> Summary:
        """The difference of two runs, as if their items were others: its error is too large rather than too small."""
        return Summary(self.figure - other.figure, math.hypot(self.error, other.error), min(self.count, other.count))


@dataclass(frozen=True)
class Contrast:
    """What one run came to less what another did, by the clusters that both have.

    Attributes:
        figure: the difference.
        residuals: of each cluster, what it adds to the figure's distance from the truth, to first order; their sum is 0.
    """

    figure: float
    residuals: Mapping[str, float]


Outcome: TypeAlias = "Sample | Summary | Contrast"


@dataclass(frozen=True)
class Pooled:
    """A mean over seeds, and its 95 % interval."""

    value: float
    interval: Interval


def shares(hits: Sequence[bool], clusters: Sequence[str]) -> Sample:
    """A sample of yes and no."""
    return Sample(tuple(map(float, hits)), (1.0,) * len(hits), tuple(clusters))


def pool(samples: Sequence[Outcome], *, share: bool = False, never_negative: bool = False) -> Pooled:
    """Mean and interval over seeds.

    Args:
        samples: one for each seed.
        share: the figure is a share, whose interval is Wilson's with as many answers as independent ones would have to be.
        never_negative: the figure is never below zero, such as a divergence: the interval is that of its logarithm, by the
            delta method, and as wide upwards as such figures are skewed.
    """
    measured = [sample for sample in samples if count_of(sample)]
    if not measured:
        return Pooled(math.nan, NOTHING)
    figures = [sample.figure for sample in measured]
    mean = sum(figures) / len(figures)
    items, clusters = _item_variance(measured)
    seeds = sum((figure - mean) ** 2 for figure in figures) / max(len(figures) - 1, 1) / len(figures)
    if math.isnan(items):
        return Pooled(mean, NOTHING)
    quantile = student_quantile(_degrees(items, clusters - 1, seeds, len(figures) - 1))
    variance = items + seeds
    if not share:
        half = quantile * math.sqrt(variance)
        interval = _of_logarithm(mean, half) if never_negative else Interval(mean - half, mean + half)
        return Pooled(max(mean, 0.0) if never_negative else mean, interval if clusters > 1 else NOTHING)
    count = sum(map(count_of, measured))
    alike = mean in {0.0, 1.0} or variance == 0  # nothing differs, so how alike the items are cannot be seen
    effective = count if alike else min(mean * (1 - mean) / variance, count)
    return Pooled(mean, wilson(mean * effective, effective) if alike else wilson(mean * effective, effective, quantile))


def _of_logarithm(mean: float, half: float) -> Interval:
    """The interval of a figure that is not negative, but for rounding, from half of the width that it would have otherwise."""
    if mean <= 0:
        return Interval(0.0, max(mean + half, 0.0))
    factor = math.exp(min(half / mean, 500.0))
    return Interval(mean / factor, mean * factor)


def count_of(sample: Outcome) -> int:
    """How many items a figure is made of; of a difference, how many clusters."""
    if isinstance(sample, Contrast):
        return len(sample.residuals)
    return len(sample.values) if isinstance(sample, Sample) else sample.count


def linearised(sample: Sample, *, by_item: bool = False) -> dict[str, float]:
    """What each cluster adds to the figure's distance from the truth, to first order (Taylor, as in surveys).

    Args:
        sample: a ratio of sums.
        by_item: take every item as a cluster of its own.
    """
    figure, total = sample.figure, sum(sample.weights)
    found: dict[str, float] = defaultdict(float)
    for number, (value, weight, cluster) in enumerate(zip(sample.values, sample.weights, sample.clusters, strict=True)):
        found[str(number) if by_item else cluster] += (value - figure * weight) / total
    return dict(found)


def _item_variance(samples: Sequence[Outcome]) -> tuple[float, int]:
    """Variance of the mean over seeds that the choice of clusters makes, and how many clusters there are."""
    known = [sample for sample in samples if not isinstance(sample, Summary)]
    if known:
        return _cluster_variance(known)
    errors = [sample.error**2 for sample in samples if isinstance(sample, Summary)]
    return sum(errors) / len(errors), min(map(count_of, samples))  # every seed has the same items


def _cluster_variance(samples: Sequence[Sample | Contrast]) -> tuple[float, int]:
    names = {name for sample in samples if isinstance(sample, Sample) for name in sample.clusters}
    means: dict[str, float] = defaultdict(float)
    for sample in samples:
        # one cluster is taken as items of their own
        own = linearised(sample, by_item=len(names) < 2) if isinstance(sample, Sample) else sample.residuals
        for name, residual in own.items():
            means[name] += residual / len(samples)
    count = len(means)
    return sum(value * value for value in means.values()) * count / max(count - 1, 1), count


def _degrees(items: float, item_degrees: int, seeds: float, seed_degrees: int) -> int:
    """Satterthwaite's, rounded down."""
    parts = [(items, item_degrees), (seeds, seed_degrees)]
    below = sum(part * part / degrees for part, degrees in parts if degrees > 0)
    if below == 0:
        return max(item_degrees, 1)
    return max(int((items + seeds) ** 2 / below), 1)
