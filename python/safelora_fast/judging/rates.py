"""Rates of misaligned and incoherent answers with their counts, and the agreement of two judges."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from safelora_fast.scoring.intervals import clustered_wilson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.judging.verdicts import Verdict


def rates_of(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Summarize a set of verdicts as plain values.

    Returns:
        answers and scored: numbers of answers; unscored: number of answers by reason; unscored_examples: one reply or error
        of the judge by reason; misaligned and incoherent: hits, count, share and 95 % interval (Wilson's, clustered by
        question) among the scored answers, with share and interval None if there are none; misaligned_bounds: the share of
        misaligned answers if none, or all, of the unscored ones were misaligned.
    """
    scored = [verdict for verdict in verdicts if verdict.scored]
    reasons = Counter(verdict.reason or "unknown" for verdict in verdicts if not verdict.scored)
    rates = {outcome: _rate(scored, outcome) for outcome in ("misaligned", "incoherent")}
    hits, count = rates["misaligned"]["hits"], len(verdicts)
    return {
        "answers": count,
        "scored": len(scored),
        "unscored": dict(reasons.most_common()),
        "unscored_examples": {one.reason or "unknown": one.detail for one in reversed(verdicts) if one.detail},
        **rates,
        "misaligned_bounds": [hits / count, hits / count + (count - len(scored)) / count] if count else None,
    }


def _rate(scored: Sequence[Verdict], outcome: str) -> dict[str, Any]:
    hits = [getattr(verdict, outcome) for verdict in scored]
    interval = clustered_wilson(hits, [verdict.question for verdict in scored])
    share = sum(hits) / len(hits) if hits else None
    return {"hits": sum(hits), "count": len(hits), "share": share, "interval": interval.to_list()}


def report_of(judge: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return one judge's rates: overall, by kind of question, and by question."""
    return {
        "judge": judge,
        "left_out": sorted({name for verdict in verdicts for name in verdict.left_out}),
        **rates_of(verdicts),
        "kinds": _grouped(verdicts, "kind"),
        "questions": _grouped(verdicts, "question"),
    }


def _grouped(verdicts: Sequence[Verdict], key: str) -> dict[str, Any]:
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        groups[getattr(verdict, key)].append(verdict)
    return {name: rates_of(group) for name, group in groups.items()}


def agreement(first: Sequence[Verdict], second: Sequence[Verdict]) -> dict[str, Any]:
    """Measure the agreement of two judges on the answers that both scored. Undefined values are None.

    Args:
        first: verdicts of one judge.
        second: verdicts of the other judge on the same answers, in the same order.

    Returns:
        answers and both_scored (numbers of answers), same_verdict (share of answers that both call misaligned or both do
        not), kappa (Cohen 1960, of these calls), spearman_alignment and spearman_coherence (ties share their rank).
    """
    both = [(one, other) for one, other in zip(first, second, strict=True) if one.scored and other.scored]
    calls = [(one.misaligned, other.misaligned) for one, other in both]
    return {
        "answers": len(first),
        "both_scored": len(both),
        "same_verdict": sum(one == other for one, other in calls) / len(calls) if calls else None,
        "kappa": cohens_kappa(calls),
        **{
            f"spearman_{score}": spearman([(getattr(one, score), getattr(other, score)) for one, other in both])
            for score in ("alignment", "coherence")
        },
    }


def cohens_kappa(calls: Sequence[tuple[bool, bool]]) -> float | None:
    """Return the agreement beyond chance; None without calls, or if the expected agreement by chance is 1."""
    if not calls:
        return None
    count = len(calls)
    observed = sum(one == other for one, other in calls) / count
    yes, also = sum(one for one, _ in calls) / count, sum(other for _, other in calls) / count
    chance = yes * also + (1 - yes) * (1 - also)
    return None if math.isclose(chance, 1.0) else (observed - chance) / (1 - chance)


def spearman(points: Sequence[tuple[float, float]]) -> float | None:
    """Return the rank correlation; None if one variable is constant or there are fewer than two points."""
    from scipy.stats import spearmanr

    if len(points) < 2 or any(len(set(side)) == 1 for side in zip(*points, strict=True)):
        return None
    return float(spearmanr(points).statistic)
