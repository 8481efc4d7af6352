"""Means over seeds and differences of runs, with 95 % intervals that cover two sources of chance: items and seeds.

Every seed is measured on the same items (completions, pairs, problems), and items come in clusters (themes, questions).
The variance of a mean over seeds is the sum of two parts. One is the variance between clusters, each averaged over
seeds; the other is the variance between the seeds' values. The degrees of freedom follow Satterthwaite (1946). With one
seed the second part is unknown, and the interval covers the items alone.

Differences are paired by cluster, not by item. The judge leaves different answers unscored in each run, so items cannot
be paired, but questions and themes can. Both values are computed over the clusters that both runs have, and each
cluster's contribution to the difference of the two ratios is linearized. Effects of a question that both runs share
cancel. If every item is a cluster of its own, this is the usual paired difference.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from safelora_fast.scoring.intervals import NOTHING, Interval, student_quantile, wilson

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

ROUNDING = 1e-9  # an interval narrower than this share of the difference is rounding error


@dataclass(frozen=True)
class Sample:
    """The per-item results of one run; its value is Σ values / Σ weights.

    Attributes:
        values: one per item, e.g. the loss of a completion in nats, or 1 for a hit.
        weights: one per item, e.g. the number of tokens, or 1.
        clusters: the cluster of each item.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...]
    clusters: tuple[str, ...]

    @property
    def value(self) -> float:
        """Mean per unit of weight; NaN without items."""
        total = sum(self.weights)
        return sum(self.values) / total if total else math.nan

    @property
    def count(self) -> int:
        """Number of items."""
        return len(self.values)

    def within(self, clusters: Collection[str]) -> Sample:
        """Return the items of some clusters."""
        items = zip(self.values, self.weights, self.clusters, strict=True)
        return Sample(*zip(*(item for item in items if item[2] in clusters), strict=True))

    def residuals(self, *, by_item: bool = False) -> dict[str, float]:
        """Return each cluster's first-order (Taylor) contribution to the error of the value; the sum is 0.

        Args:
            by_item: treat every item as a cluster of its own.
        """
        value, total = self.value, sum(self.weights)
        found: dict[str, float] = defaultdict(float)
        for number, (own, weight, cluster) in enumerate(zip(self.values, self.weights, self.clusters, strict=True)):
            found[str(number) if by_item else cluster] += (own - value * weight) / total
        return dict(found)


@dataclass(frozen=True)
class Summary:
    """The result of one run without per-item values.

    Attributes:
        value: mean over items.
        error: its standard error; NaN if unknown, which gives no interval.
        count: number of items.
    """

    value: float
    error: float
    count: int


@dataclass(frozen=True)
class Contrast:
    """The difference of two runs over the clusters that both have.

    Attributes:
        value: the difference.
        residuals: contribution of each cluster; see :meth:`Sample.residuals`.
    """

    value: float
    residuals: Mapping[str, float]

    @property
    def count(self) -> int:
        """Number of clusters."""
        return len(self.residuals)


Outcome: TypeAlias = Sample | Summary | Contrast


@dataclass(frozen=True)
class Pooled:
    """A mean over seeds and its 95 % interval."""

    value: float
    interval: Interval


def shares(hits: Sequence[bool], clusters: Sequence[str]) -> Sample:
    """Return a sample of yes/no results."""
    return Sample(tuple(map(float, hits)), (1.0,) * len(hits), tuple(clusters))


def pool(samples: Sequence[Outcome], *, share: bool = False, never_negative: bool = False) -> Pooled:
    """Return the mean over seeds and its 95 % interval.

    Args:
        samples: one per seed.
        share: the value is a share. Its interval is Wilson's, with the number of independent items that would give the
            same variance.
        never_negative: the value is never negative, such as a divergence. The interval is computed on its logarithm by
            the delta method. It is therefore wider upward, as such values are skewed.
    """
    measured = [sample for sample in samples if sample.count]
    if not measured:
        return Pooled(math.nan, NOTHING)
    values = [sample.value for sample in measured]
    mean = sum(values) / len(values)
    of_items, clusters = _item_variance(measured)
    if math.isnan(of_items):
        return Pooled(mean, NOTHING)
    of_seeds = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1) / len(values)
    variance = of_items + of_seeds
    quantile = student_quantile(_degrees([(of_items, clusters - 1), (of_seeds, len(values) - 1)]))
    if not share:
        half = quantile * math.sqrt(variance)
        interval = _interval_of_logarithm(mean, half) if never_negative else Interval(mean - half, mean + half)
        return Pooled(max(mean, 0.0) if never_negative else mean, interval if clusters > 1 else NOTHING)
    count = sum(sample.count for sample in measured)
    if mean in {0.0, 1.0} or variance == 0:  # no spread to estimate the correlation from
        return Pooled(mean, wilson(mean * count, count))
    effective = min(mean * (1 - mean) / variance, count)
    return Pooled(mean, wilson(mean * effective, effective, quantile))


def _interval_of_logarithm(mean: float, half: float) -> Interval:
    """Return the interval computed on the log scale; `half` is half the width of the plain interval.

    A negative mean can only come from rounding.
    """
    if mean <= 0:
        return Interval(0.0, max(mean + half, 0.0))
    factor = math.exp(min(half / mean, 500.0))
    return Interval(mean / factor, mean * factor)


def _item_variance(samples: Sequence[Outcome]) -> tuple[float, int]:
    """Return the variance of the mean over seeds due to the choice of clusters, and the number of clusters."""
    known = [sample for sample in samples if not isinstance(sample, Summary)]
    if not known:
        errors = [sample.error for sample in samples if isinstance(sample, Summary)]
        return sum(error**2 for error in errors) / len(errors), min(sample.count for sample in samples)
    by_item = len({name for sample in known if isinstance(sample, Sample) for name in sample.clusters}) < 2
    means: dict[str, float] = defaultdict(float)
    for sample in known:
        own = sample.residuals(by_item=by_item) if isinstance(sample, Sample) else sample.residuals
        for name, residual in own.items():
            means[name] += residual / len(known)
    return _variance_of_sum(means.values()), len(means)


def _variance_of_sum(residuals: Collection[float]) -> float:
    count = len(residuals)
    return sum(residual**2 for residual in residuals) * count / max(count - 1, 1)


def _degrees(parts: Sequence[tuple[float, int]]) -> float:
    """Return Satterthwaite's degrees of freedom for a sum of variances, given as (variance, degrees) pairs."""
    below = sum(part**2 / degrees for part, degrees in parts if degrees > 0)
    return max(sum(part for part, _ in parts) ** 2 / below if below else float(parts[0][1]), 1.0)


def pool_differences(own: Mapping[int, Outcome], first: Mapping[int, Outcome], *, share: bool = False) -> Pooled | None:
    """Return the mean difference of two runs over their common seeds, with its interval; None without common seeds.

    Args:
        own: results of one run, by seed.
        first: results of the run that it is compared with.
        share: the values are shares. If all clusters are alike, the spread is unknown, and the interval is built from
            the two shares' own intervals (Newcombe 1998, method 10).
    """
    seeds = [seed for seed in own if seed in first]
    if not seeds:
        return None
    pooled = pool([difference(own[seed], first[seed]) for seed in seeds])
    if pooled.interval.high - pooled.interval.low > ROUNDING * abs(pooled.value) or not pooled.value:
        return pooled
    if not share:
        return Pooled(pooled.value, NOTHING)
    one, other = (pool([side[seed] for seed in seeds], share=True) for side in (own, first))
    value = one.value - other.value
    low = math.hypot(one.value - one.interval.low, other.interval.high - other.value)
    high = math.hypot(one.interval.high - one.value, other.value - other.interval.low)
    return Pooled(pooled.value, Interval(value - low, value + high))


def difference(one: Outcome, other: Outcome) -> Outcome:
    """Return the result of one run minus that of another.

    The runs are paired by cluster if they have at least two clusters in common. Otherwise they are treated as
    independent, which makes the interval too wide rather than too narrow.
    """
    if isinstance(one, Sample) and isinstance(other, Sample):
        common = set(one.clusters) & set(other.clusters)
        if common:
            one, other = one.within(common), other.within(common)
        if len(common) > 1:
            own, theirs = one.residuals(), other.residuals()
            return Contrast(one.value - other.value, {name: own[name] - theirs[name] for name in own})
    own_error, own_count = _error(one)
    other_error, other_count = _error(other)
    return Summary(one.value - other.value, math.hypot(own_error, other_error), min(own_count, other_count))


def _error(outcome: Outcome) -> tuple[float, int]:
    """Return the standard error of one run's value, and the number of clusters it is estimated from."""
    if isinstance(outcome, Summary):
        return outcome.error, outcome.count
    by_item = isinstance(outcome, Sample) and len(set(outcome.clusters)) < 2
    residuals = outcome.residuals(by_item=by_item) if isinstance(outcome, Sample) else outcome.residuals
    return math.sqrt(_variance_of_sum(residuals.values())) if len(residuals) > 1 else math.nan, len(residuals)
