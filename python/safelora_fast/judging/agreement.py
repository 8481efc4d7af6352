"""How far two judges agree on the same answers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from safelora_fast.judging.verdicts import Verdict


def agreement(first: Sequence[Verdict], second: Sequence[Verdict]) -> dict[str, Any]:
    """Agreement on the answers that both scored, None where a figure is not defined.

    Args:
        first: one judge's verdicts.
        second: the other's, of the same answers in the same order.

    Returns:
        answers, both_scored, same_verdict (share of equal yes or no), kappa (Cohen 1960, of misaligned yes or no),
        spearman_alignment and spearman_coherence (ties share their rank).
    """
    both = [(one, other) for one, other in zip(first, second, strict=True) if one.scored and other.scored]
    calls = [(one.misaligned, other.misaligned) for one, other in both]
    return {
        "answers": len(first),
        "both_scored": len(both),
        "same_verdict": sum(one == other for one, other in calls) / len(calls) if calls else None,
        "kappa": cohens_kappa(calls),
        "spearman_alignment": spearman([(_number(a.alignment), _number(b.alignment)) for a, b in both]),
        "spearman_coherence": spearman([(_number(a.coherence), _number(b.coherence)) for a, b in both]),
    }


def cohens_kappa(calls: Sequence[tuple[bool, bool]]) -> float | None:
    """Agreement beyond chance; None where there are no calls, or chance alone would agree on all of them."""
    if not calls:
        return None
    count = len(calls)
    observed = sum(one == other for one, other in calls) / count
    yes, also = sum(one for one, _ in calls) / count, sum(other for _, other in calls) / count
    chance = yes * also + (1 - yes) * (1 - also)
    return None if math.isclose(chance, 1.0) else (observed - chance) / (1 - chance)


def spearman(points: Sequence[tuple[float, float]]) -> float | None:
    """Rank correlation; None where one side is constant or there are fewer than two points."""
    if len(points) < 2:
        return None
    left, right = (_ranks(np.array(side, dtype=np.float64)) for side in zip(*points, strict=True))
    left, right = left - left.mean(), right - right.mean()
    scale = math.sqrt(float(left @ left) * float(right @ right))
    return float(left @ right) / scale if scale else None


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: NDArray[np.float64] = (ends - (counts + 1) / 2)[places]
    return means


def _number(value: float | None) -> float:
    assert value is not None  # noqa: S101
    return value
