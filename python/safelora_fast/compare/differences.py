"""What one run came to less what another did, with an interval: paired by cluster, not by item.

Answers that the judge leaves unscored differ from run to run, so items have no partners, but the clusters (questions,
themes) do. Both figures are taken over the clusters that both runs have, and what each cluster adds to the difference of the
two ratios is linearised; answers to one question are alike in both runs, and what they share cancels. Where items are all
the same ones in clusters of their own, that is the paired difference.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from safelora_fast.compare.pooling import Contrast, Pooled, Sample, Summary, linearised, pool
from safelora_fast.scoring.intervals import NOTHING, Interval

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safelora_fast.compare.pooling import Outcome

EXACT = 1e-9  # of the difference: a narrower interval is rounding


def pool_differences(own: Mapping[int, Outcome], first: Mapping[int, Outcome], *, share: bool = False) -> Pooled | None:
    """Mean difference over the seeds that both have, and its interval; None where they have none.

    Args:
        own: what a run came to, by seed.
        first: what the run came to that it is held against.
        share: the figures are shares. Where no cluster differs from another, so that chance cannot be seen, the interval is
            that of the two shares' own intervals (Newcombe 1998, method 10).
    """
    seeds = [seed for seed in own if seed in first]
    if not seeds:
        return None
    pooled = pool([difference(own[seed], first[seed]) for seed in seeds])
    if pooled.interval.high - pooled.interval.low > EXACT * abs(pooled.value) or not pooled.value:
        return pooled
    if not share:
        return Pooled(pooled.value, NOTHING)
    return Pooled(
        pooled.value, _of_shares(*(pool([side[seed] for seed in seeds], share=True) for side in (own, first)))
    )


def difference(one: Outcome, other: Outcome) -> Outcome:
    """What one run came to less what another did.

    By cluster where both have at least two; else as if the two were independent, which gives too wide an interval rather
    than too narrow a one.
    """
    if isinstance(one, Sample) and isinstance(other, Sample):
        common = set(one.clusters) & set(other.clusters)
        if common:
            one, other = one.within(common), other.within(common)
        if len(common) > 1:
            own, theirs = linearised(one), linearised(other)
            residuals = {name: own[name] - theirs[name] for name in own}
            return Contrast(one.figure - other.figure, residuals)
    return _summary(one).minus(_summary(other))


def _summary(outcome: Outcome) -> Summary:
    """What is left of a sample without its items."""
    if isinstance(outcome, Summary):
        return outcome
    if isinstance(outcome, Sample):
        residuals: Mapping[str, float] = linearised(outcome, by_item=len(set(outcome.clusters)) < 2)
    else:
        residuals = outcome.residuals
    count = len(residuals)
    squares = sum(value * value for value in residuals.values())
    return Summary(outcome.figure, math.sqrt(squares * count / (count - 1)) if count > 1 else math.nan, count)


def _of_shares(one: Pooled, other: Pooled) -> Interval:
    """Of the difference of two independent shares, from their own intervals."""
    value = one.value - other.value
    (a, b), (c, d) = ((pooled.interval.low, pooled.interval.high) for pooled in (one, other))
    low = math.hypot(one.value - a, d - other.value)
    high = math.hypot(b - one.value, other.value - c)
    return Interval(value - low, value + high)
