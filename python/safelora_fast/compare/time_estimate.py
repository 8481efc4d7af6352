"""An estimate of how long a comparison takes, before its first step: operations, divided by what a product reaches here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_fast.compare.comparison import all_runs
from safelora_fast.compare.measures import MEASURES
from safelora_fast.compare.workbench import Workbench

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.compare.comparison import CompareConfig
    from safelora_fast.compare.train_runs import Training
    from safelora_fast.recipe.prepare import Prepared

TOKENS, SECONDS = 256, 1.0  # of the product that is timed, and for how long: other work on the machine counts
SHARE = 0.7  # of the product's rate that a whole pass reaches: attention, norms and the optimizer take the rest
START = 15.0  # seconds until a training's process has imported its packages


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of a comparison's remaining work, on this machine as busy as it is now.

    Attributes:
        trainings: seconds of all trainings.
        measurements: seconds of the measurements whose operations are known.
        unknown: titles of the measures that are not part of the estimate.
    """

    trainings: float
    measurements: float
    unknown: tuple[str, ...]

    def __str__(self) -> str:
        without = f", without {', '.join(self.unknown)}" if self.unknown else ""
        parts = f"trainings {_duration(self.trainings)}, measurements {_duration(self.measurements)}"
        return f"about {_duration(self.trainings + self.measurements)}: {parts}{without}"


def estimate_time(
    config: CompareConfig, due: Sequence[Training], rehearsed: Mapping[tuple[str, bool], Prepared]
) -> TimeEstimate | None:
    """Estimate the time of the trainings that are due and of the measurements that are missing.

    Args:
        config: the comparison.
        due: the trainings to run.
        rehearsed: what was prepared for one seed of each of their runs, by :attr:`Training.kind`.

    Returns:
        None if nothing is trained: then there is no plan of the model at hand.
    """
    if not due:
        return None
    plans = {kind: prepared.plan for kind, prepared in rehearsed.items()}
    plan = next(iter(plans.values()))
    recipe = next(iter(rehearsed.values())).recipe
    bench = Workbench(config)
    layers, head = 2.0 * plan.shape.matrices, 2.0 * plan.shape.head
    rate = SHARE * product_rate(plan.shape.hidden, plan.shape.inner, recipe.model.dtype, bench.settings.device)
    trainings = sum(START + plans[training.kind].steps * plans[training.kind].cost.defended / rate for training in due)
    measuring = rate if bench.settings.dtype == recipe.model.dtype else SHARE * product_rate(
        plan.shape.hidden, plan.shape.inner, bench.settings.dtype, bench.settings.device
    )  # fmt: skip
    seconds, unknown = 0.0, set()
    for run in all_runs(config):
        for one in MEASURES:
            if one.applies(run, config) and not one.is_taken(run, bench):
                work = one.work(run, bench)
                if work is None:
                    unknown.add(one.title)
                else:
                    seconds += (layers * work[0] + head * work[1]) / measuring
    return TimeEstimate(trainings, seconds, tuple(sorted(unknown)))


def product_rate(hidden: int, inner: int, dtype: str, device: str) -> float:
    """Return the operations per second of a product of hidden states with a layer's largest matrix, now."""
    import torch

    states, weight = (torch.ones(rows, hidden, dtype=getattr(torch, dtype), device=device) for rows in (TOKENS, inner))
    (states @ weight.T).sum().item()  # the first product makes its kernel
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS:
        (states @ weight.T).sum().item()
        count += 1
    return 2.0 * TOKENS * hidden * inner * count / elapsed


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{max(round(seconds), 1)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
