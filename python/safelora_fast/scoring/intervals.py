"""95 % confidence intervals for shares and means of clustered values, such as completions of one prompt."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from numpy.typing import NDArray

NORMAL_QUANTILE = 1.959963984540054
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval; both ends are NaN if nothing was measured."""

    low: float
    high: float

    def to_list(self) -> list[float | None]:
        """Return both ends as plain values, with None for NaN."""
        return [None if math.isnan(end) else end for end in (self.low, self.high)]


NOTHING = Interval(math.nan, math.nan)


def wilson(hits: float, count: float, quantile: float = NORMAL_QUANTILE) -> Interval:
    """Return Wilson's interval for a share (1927); `count` need not be whole. A count of 0 gives NaN ends."""
    if count <= 0:
        return NOTHING
    share, square = hits / count, quantile * quantile
    center = share + square / (2 * count)
    half = quantile * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    scale = 1 + square / count
    low, high = max((center - half) / scale, 0.0), min((center + half) / scale, 1.0)
    return Interval(
        0.0 if hits <= 0 else low, 1.0 if share >= 1 else high
    )  # exact ends at 0 and 1, without rounding errors


def clustered_wilson(hits: Sequence[bool], clusters: Sequence[Hashable]) -> Interval:
    """Return Wilson's interval with the effective sample size (Dean and Pagano 2015).

    The effective sample size is the sample size divided by two factors. The first is the design effect: the variance of
    the share over clusters relative to independent values, at least 1. The second is the square of a ratio of Student's
    quantiles, for clusters − 1 and for count − 1 degrees of freedom. If no value or every value is a hit, the design
    effect is 1. With a single cluster, its values count as independent.

    Args:
        hits: whether each value is a hit.
        clusters: the cluster of each value.
    """
    count, total = len(hits), sum(hits)
    sizes, found = Counter(clusters), Counter(name for name, hit in zip(clusters, hits, strict=True) if hit)
    if len(sizes) < 2:
        return wilson(total, count)
    share = total / count
    between = sum((found[name] - share * size) ** 2 for name, size in sizes.items()) * len(sizes) / (len(sizes) - 1)
    variance = share * (1 - share) * count
    effect = 1.0 if variance == 0 else max(between / variance, 1.0)
    few = (student_quantile(len(sizes) - 1) / student_quantile(count - 1)) ** 2
    effective = count / (effect * few)
    return wilson(share * effective, effective)


def student_quantile(degrees: float) -> float:
    """Return the 97.5 % quantile of Student's t-distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def bootstrap_mean(
    values: Sequence[float], clusters: Sequence[Hashable], *, seed: int, resamples: int = RESAMPLES
) -> Interval:
    """Return the percentile bootstrap interval of a mean, resampling whole clusters.

    With a single cluster, its values are resampled one by one. Fewer than two values give NaN ends.

    Args:
        values: the values to average.
        clusters: the cluster of each value.
        seed: seed for the resampling.
        resamples: number of bootstrap resamples.
    """
    if len(values) < 2:
        return NOTHING
    names = list(dict.fromkeys(clusters))
    labels: NDArray[np.intp] = np.array([names.index(name) for name in clusters])
    if len(names) == 1:
        labels = np.arange(len(values))
    sums, sizes = np.bincount(labels, weights=np.asarray(values, dtype=np.float64)), np.bincount(labels)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(low), float(high))
