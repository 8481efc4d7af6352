"""When to stop a training because misalignment rises: a rule with a bounded rate of false alarms per run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from safelora_fast.defenses.drift_monitor import DriftMonitor

MARGIN = "margin"


@dataclass(frozen=True)
class StopRule:
    """An alarm that ends a training (arXiv 2605.12199, 2606.07631: misalignment comes late, and trait projections show it).

    The signals are the rise of the margin and, for each monitor, the finetuning shift of Chen et al. (arXiv 2507.21509,
    section 4): the change of the hidden state of the last prompt token, projected on the persona vector. An alarm is
    raised when the lower confidence bound of a signal is above its limit. The bound is one-sided, by Student's t over
    themes, at the level `alpha`/(measurements × signals): under no change beyond the limits, at most a share `alpha` of
    the runs raises one (Bonferroni; as far as means of themes are normal).

    Clean fine-tuning moves every signal, so each needs a limit. `clean` sets or raises it to the highest value that one of
    several clean runs has reached, which calibrates the rule on them: of n clean runs and one more of the same kind, each
    is equally likely to reach the highest value, so the next one exceeds it with probability at most 1/(n + 1).

    Attributes:
        alpha: rate of false alarms per run, above 0 and below 1.
        limits: by signal, "margin" (nats per token) or a monitor's name (units of the hidden states).
        monitors: the traits to watch, in addition to the margin.
        clean: for each clean run the highest value of each signal, from :attr:`MarginCallback.highest`.
        after_task: stop only once the held-out loss has stopped falling; this needs evaluations during training.

    Raises:
        SettingsError: a value is out of range, a name is unknown or occurs twice, or a signal has no limit.
    """

    alpha: float = 0.05
    limits: Mapping[str, float] = field(default_factory=dict)
    monitors: Sequence[DriftMonitor] = ()
    clean: Sequence[Mapping[str, float]] = ()
    after_task: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise SettingsError(f"stop: alpha is {self.alpha}, it must be above 0 and below 1")
        if len(set(self.signals)) < len(self.signals):
            raise SettingsError(f"stop: each signal needs a name of its own; they are {', '.join(self.signals)}")
        for name, limit in self.limits.items():
            if name not in self.signals:
                raise SettingsError(f"stop: there is no signal {name!r} to limit; known are {', '.join(self.signals)}")
            if not math.isfinite(limit):
                raise SettingsError(f"stop: the limit of {name} is {limit}, it must be finite")
        unlimited = [name for name in self.signals if name not in self.limits and not self.clean]
        if unlimited:
            raise SettingsError(
                f"stop: {unlimited[0]} has no limit, and any fine-tuning moves it: set one, or name clean runs"
            )
        for number, run in enumerate(self.clean, start=1):
            for name in self.signals:
                if not math.isfinite(run.get(name, math.nan)):
                    raise SettingsError(
                        f"stop: clean run {number} has not measured {name}; run it with the same signals"
                    )

    @property
    def signals(self) -> tuple[str, ...]:
        """The names of all signals."""
        return MARGIN, *(monitor.name for monitor in self.monitors)

    def limit(self, signal: str) -> float:
        """Return the limit of a signal: the given one, or the highest value of a clean run if that is above it."""
        given = [self.limits[signal]] if signal in self.limits else []
        return max([*given, *(run[signal] for run in self.clean)])

    def bound(self, changes: Sequence[float], themes: Sequence[Hashable], measurements: int) -> float:
        """Return the lower confidence bound of the mean change of a signal.

        Args:
            changes: one for each pair.
            themes: the theme of each pair.
            measurements: number of measurements of the whole run.
        """
        return lower_bound(changes, themes, self.alpha / (max(measurements, 1) * len(self.signals)))


def lower_bound(changes: Sequence[float], clusters: Sequence[Hashable], level: float) -> float:
    """Return the one-sided lower confidence bound of a mean of clustered values, by Student's t over clusters.

    Args:
        changes: the values.
        clusters: the cluster of each value. A single cluster counts as independent values.
        level: probability that the mean is below the bound.

    Returns:
        The bound; −∞ with fewer than two clusters and values.
    """
    from scipy.special import stdtrit

    values = np.asarray(changes, np.float64)
    names = list(dict.fromkeys(clusters))
    labels = np.array([names.index(name) for name in clusters]) if len(names) > 1 else np.arange(len(values))
    groups = int(labels.max()) + 1 if len(labels) else 0
    if groups < 2:
        return -math.inf
    mean = values.mean()
    sums = np.bincount(labels, weights=values - mean)
    error = math.sqrt(groups / (groups - 1) * float((sums**2).sum())) / len(values)
    return float(mean + stdtrit(groups - 1, level) * error)
