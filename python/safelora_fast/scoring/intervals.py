"""95 % intervals of shares and means whose members come in clusters: answers to one question, pairs of one theme."""

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
    """A 95 % interval; NaN at both ends if nothing was measured."""

    low: float
    high: float

    def to_list(self) -> list[float | None]:
        """Both ends as plain values, None for NaN."""
        return [None if math.isnan(end) else end for end in (self.low, self.high)]


NOTHING = Interval(math.nan, math.nan)


def wilson(hits: float, count: float, quantile: float = NORMAL_QUANTILE) -> Interval:
    """Wilson's interval of a share (1927); `count` need not be whole. Nothing counted: no interval."""
    if count <= 0:
        return NOTHING
    share, square = hits / count, quantile * quantile
    center = share + square / (2 * count)
    half = quantile * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    scale = 1 + square / count
    low, high = max((center - half) / scale, 0.0), min((center + half) / scale, 1.0)
    return Interval(
        0.0 if hits <= 0 else low, 1.0 if share >= 1 else high
    )  # exactly, where rounding is all that differs


def clustered_wilson(hits: Sequence[bool], clusters: Sequence[Hashable]) -> Interval:
    """Wilson's interval with the effective number of independent members (Dean and Pagano 2015).

    The effective number is the real one divided by the design effect (the variance of the share over clusters, relative to that
    of independent members, at least 1), and by the square of Student's quantile over the normal one, because clusters are few.
    If no member or every member is a hit, nothing shows how alike a cluster is, and the design effect is 1. The members of one
    cluster alone count as clusters of their own.

    Args:
        hits: what is counted.
        clusters: the cluster of each.
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
    """The 97.5 % quantile of Student's distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def bootstrap_mean(
    values: Sequence[float], clusters: Sequence[Hashable], *, seed: int, resamples: int = RESAMPLES
) -> Interval:
    """Percentile interval of a mean by resampling whole clusters; the values of one cluster alone count as clusters.

    One value alone has no interval: all draws of it are alike.

    Args:
        values: what is averaged.
        clusters: the cluster of each.
        seed: of the draws.
        resamples: how many times all clusters are drawn.
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
