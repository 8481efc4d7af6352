"""The figures of the training comparison, from what was measured on each answer and at each step."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from safelora_fast.demo.variants import REFERENCE, UNDEFENDED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.demo.drift import Answer

WARM_UP = 5


@dataclass(frozen=True)
class Mean:
    """A mean per answer token, with its standard error over the answers."""

    value: float
    error: float


@dataclass(frozen=True)
class Outcome:
    """What a model learned and how far it drifted, in nats per answer token; changes are against the reference.

    Attributes:
        narrow: loss on held-out narrow answers.
        narrow_change: the same, less the reference's.
        general: loss on general answers.
        general_change: the same, less the reference's.
        divergence: KL(model ‖ reference) on general answers.
    """

    narrow: Mean
    narrow_change: Mean
    general: Mean
    general_change: Mean
    divergence: Mean


@dataclass(frozen=True)
class Cost:
    """What a training cost.

    Attributes:
        step: median seconds of a step after the first few.
        relative: the same, beside no defence.
        steps: seconds of all steps.
        end: seconds of what the defences did after the last one.
        peak: most bytes resident in its process.
    """

    step: float
    relative: float
    steps: float
    end: float
    peak: int


def per_token(sums: Sequence[float], tokens: Sequence[int]) -> Mean:
    """Mean of sums per token; the error is that of a ratio of two means over independent answers."""
    total, count = sum(tokens), len(tokens)
    mean = sum(sums) / total
    squares = sum((value - mean * number) ** 2 for value, number in zip(sums, tokens, strict=True))
    return Mean(mean, math.sqrt(squares * count / max(count - 1, 1)) / total)


def outcome(model: Mapping[str, Sequence[Answer]], reference: Mapping[str, Sequence[Answer]]) -> Outcome:
    """Figures of a model from its answers in the sets "narrow" and "general"; changes are paired answer by answer."""
    means = {}
    for name, answers in model.items():
        tokens = [answer.tokens for answer in answers]
        changes = [own.loss - other.loss for own, other in zip(answers, reference[name], strict=True)]
        means[name] = per_token([answer.loss for answer in answers], tokens)
        means[f"{name}_change"] = per_token(changes, tokens)
        if name == "general":
            means["divergence"] = per_token([answer.divergence for answer in answers], tokens)
    return Outcome(**means)


def cost(steps: Sequence[float], end: float, peak: int, undefended: Sequence[float]) -> Cost:
    """Figures of a training from the seconds of its steps and of the undefended one's."""
    step, usual = (statistics.median(seconds[WARM_UP:] or seconds) for seconds in (steps, undefended))
    return Cost(step, step / usual, sum(steps), end, peak)


def drift_at(narrow: float, path: Sequence[tuple[float, float]]) -> float:
    """Divergence at a narrow loss, along a path of (narrow loss, divergence); NaN where the path does not go.

    Divergence grows about as the square of the update, so it is its root that is interpolated.
    """
    for (first, low), (second, high) in pairwise(sorted(path)):
        if first <= narrow <= second:
            share = (narrow - first) / (second - first) if second > first else 0.0
            return ((1 - share) * math.sqrt(max(low, 0.0)) + share * math.sqrt(max(high, 0.0))) ** 2
    return math.nan


@dataclass(frozen=True)
class Comparison:
    """All figures of the comparison.

    Attributes:
        outcomes: of the reference and of every variant.
        costs: of every variant.
        weakened: of the undefended adapter with its update scaled down, by the share that is kept ("0.5").
        settings: the weights of every defended variant, in words.
        ingredients: what was chosen and extracted for Interleaving++ ("selection") and for steering ("persona").
    """

    outcomes: Mapping[str, Outcome]
    costs: Mapping[str, Cost]
    weakened: Mapping[str, Outcome]
    settings: Mapping[str, str]
    ingredients: Mapping[str, Any] = field(default_factory=dict)

    def learned(self, name: str) -> float:
        """What a variant learned of held-out narrow answers, as a share of what is learned without defence."""
        return self.outcomes[name].narrow_change.value / self.outcomes[UNDEFENDED].narrow_change.value

    def weakened_drift(self, name: str) -> float:
        """Divergence of the undefended update when it is weakened until it has learned as much as a variant."""
        points = [self.outcomes[REFERENCE], *self.weakened.values(), self.outcomes[UNDEFENDED]]
        path = [(point.narrow.value, point.divergence.value) for point in points]
        return drift_at(self.outcomes[name].narrow.value, path)
