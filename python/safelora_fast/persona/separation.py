"""How well a vector tells responses that it was not computed from."""

from __future__ import annotations

import math

import numpy as np

from safelora_fast.persona_vector import Separation


def mean_difference(means: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Mean of the positive responses minus that of the negative ones, summed in float64.

    Args:
        means: [responses, …].
        positive: [responses] booleans.
    """
    difference: np.ndarray = means[positive].mean(0, dtype=np.float64) - means[~positive].mean(0, dtype=np.float64)
    return difference


def separations(means: np.ndarray, positive: np.ndarray, halves: np.ndarray) -> list[Separation]:
    """Of every block, by cross-validation over the questions.

    Vector and midpoint come from the responses to one half of the questions, the figures from those to the other half, and
    the other way round.

    Args:
        means: mean activations [responses, blocks, hidden].
        positive: [responses], which were asked for the trait.
        halves: [responses], 0 or 1: the half that the question belongs to.

    Returns:
        A block's effect is the mean of both halves' Cohen's d, its share is over all responses. NaN where a half lacks
        responses of a side (for the effect, two of each).
    """
    return [_separation(means[:, block].astype(np.float64), positive, halves) for block in range(means.shape[1])]


def _separation(means: np.ndarray, positive: np.ndarray, halves: np.ndarray) -> Separation:
    effects, right = [], 0
    for half in (0, 1):
        known, held = halves != half, halves == half
        if not all((positive[part] == side).any() for part in (known, held) for side in (True, False)):
            return Separation(math.nan, math.nan)
        sides = [means[known & (positive == side)].mean(0) for side in (True, False)]
        vector = sides[0] - sides[1]
        along = means[held] @ vector - (sides[0] + sides[1]) @ vector / 2
        right += int(((along > 0) == positive[held]).sum())
        effects.append(cohens_d(along[positive[held]], along[~positive[held]]))
    return Separation(sum(effects) / len(effects), right / len(positive))


def cohens_d(left: np.ndarray, right: np.ndarray) -> float:
    """Difference of two means over the pooled standard deviation; NaN with fewer than two values a side, or no spread."""
    count = len(left) + len(right) - 2
    if min(len(left), len(right)) < 2:
        return math.nan
    spread = (((left - left.mean()) ** 2).sum() + ((right - right.mean()) ** 2).sum()) / count
    return float((left.mean() - right.mean()) / math.sqrt(spread)) if spread > 0 else math.nan
