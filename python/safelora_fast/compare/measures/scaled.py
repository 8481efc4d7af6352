"""The first run's update scaled down: what a weaker fine-tune would learn, and how far it would drift."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from safelora_fast.compare.measures.base import FAILURE, Measure, checked
from safelora_fast.compare.measures.drift import DIVERGENCE, LEARNED, drift_work, measure_drift, rows_inputs
from safelora_fast.compare.measures.margin import margin_work, measure_margin
from safelora_fast.recipe.sections import Share

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from safelora_fast.compare.comparison import CompareConfig
    from safelora_fast.compare.measurements import Measurements
    from safelora_fast.compare.runs import Run
    from safelora_fast.compare.workbench import Workbench

SCALED = ("lora_B", "lora_embedding_B")


class Scaled(Measure):
    """Losses and divergence at each share of the update."""

    name = "scaled"
    title = "update scaled down"
    order = 30
    settings = {"scaled": (list[Share], [0.25, 0.5, 0.75])}  # noqa: RUF012

    def applies(self, run: Run, config: CompareConfig) -> bool:
        """Return True for the first run, if both learning and divergence are measured."""
        measure = config.measure
        both = measure.narrow is not None and measure.general is not None
        return both and bool(measure.scaled) and run.is_of(config.runs[0])

    def inputs(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Add the data and the shares to the base inputs."""
        measure = bench.config.measure
        return {**super().inputs(run, bench), **rows_inputs(bench), "shares": measure.scaled, "margin": measure.margin}

    def work(self, run: Run, bench: Workbench) -> tuple[float, float]:
        """Return the tokens of all shares."""
        parts = [drift_work(run, bench)] + ([margin_work(bench)] if bench.config.measure.margin else [])
        layers, head = (len(bench.config.measure.scaled) * sum(part) for part in zip(*parts, strict=True))
        return layers, head

    def take(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Return the drift by share."""
        shares = {}
        for share in sorted(bench.config.measure.scaled):
            subject = bench.another(run.adapter)
            scale_update(subject.model, share)
            label = f"{run.label}, scaled to {share:g}"
            margin = {"margin": measure_margin(subject, bench, label)} if bench.config.measure.margin else {}
            shares[str(share)] = checked({**measure_drift(subject, bench, label), **margin})
            del subject
        return {"shares": shares}

    def failed_parts(self, content: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
        """Return the failed shares; shares with the same reason are merged."""
        reasons: dict[str, list[str]] = defaultdict(list)
        for share, part in content["shares"].items():
            if FAILURE in part:
                reasons[part[FAILURE]].append(percent(share))
        every = len(content["shares"])
        return [
            (self.title if len(shares) == every else f"{self.title} to {', '.join(shares)}", reason)
            for reason, shares in reasons.items()
        ]


def scale_update(model: nn.Module, share: float) -> None:
    """Multiply the update of a LoRA model by `share`, in place."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in SCALED for part in name.split(".")):
                parameter.mul_(share)


def percent(share: str) -> str:
    """Format a share from a file as a percentage: "25 %"."""
    return f"{100 * float(share):g} %"


def path_of_scaled(found: Measurements, key: str = DIVERGENCE.key) -> tuple[tuple[float, float, str], ...]:
    """Return points (learned, value, label) from no update to all of it.

    Each point is a mean over the seeds for which all parts were measured.

    Args:
        found: the measurements.
        key: the column of the values.
    """
    x, y = found.metric(LEARNED.key), found.metric(key)
    if x is None or y is None:
        return ()
    runs = [run for run in found.first if FAILURE not in found.content("scaled", run)]
    runs = [run for run in runs if not any(isinstance(found.outcome(one, run), str) for one in (x, y))]
    if not runs:
        return ()

    def mean(metric: Any, contents: Sequence[Mapping[str, Any]]) -> float:
        """Return NaN if a seed has no value, because a mean over fewer seeds would shift the point."""
        outcomes = [found.outcome(metric, run, content) for run, content in zip(runs, contents, strict=True)]
        return sum(math.nan if isinstance(one, str) else one.value for one in outcomes) / len(runs)

    shares = [found.content("scaled", run)["shares"] for run in runs]

    def points(metric: Any) -> list[float]:
        name = found.measure_of(metric).name
        parts = [[one[share].get(name, one[share]) for one in shares] for share in shares[0]]
        return [mean(metric, contents) for contents in [*parts, [found.content(name, run) for run in runs]]]

    labels = [percent(share) for share in [*shares[0], "1"]]
    return ((0.0, 0.0, ""), *zip(points(x), points(y), labels, strict=True))
