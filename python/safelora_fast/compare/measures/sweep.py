"""SafeLoRA on the first run's adapters at each threshold: margin and drift, from one pass over two checkpoints."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from safelora_fast.compare.measures.base import FAILURE, Measure, checked
from safelora_fast.compare.measures.drift import has_rows, measure_drift, rows_inputs
from safelora_fast.compare.measures.margin import measure_margin
from safelora_fast.compare.report import SWEEP_TITLE, SweepPoint
from safelora_fast.configuration.yaml_section import Section
from safelora_fast.recipe.model_stamp import checkpoint_digest, model_commit

if TYPE_CHECKING:
    from pathlib import Path

    from safelora_fast.compare.comparison import CompareConfig
    from safelora_fast.compare.measurements import Measurements
    from safelora_fast.compare.runs import Run
    from safelora_fast.compare.workbench import Workbench

THRESHOLDS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
Cosine = Annotated[float, Field(ge=-1, le=1)]


class SweepSection(Section):
    """The `sweep:` section.

    Attributes:
        base: the model before alignment.
        aligned: the aligned model; the recipe's model by default.
        thresholds: cosine thresholds τ.
        seeds: the comparison's seeds to sweep; all by default.
    """

    base: str
    aligned: str | None = None
    thresholds: list[Cosine] = Field(default_factory=lambda: list(THRESHOLDS), min_length=1)
    seeds: list[int] | None = None


class Sweep(Measure):
    """Margin and drift of the projected adapter at each threshold."""

    name = "sweep"
    title = SWEEP_TITLE
    order = 40
    settings = {"sweep": (SweepSection | None, None)}  # noqa: RUF012

    def check(self, config: CompareConfig) -> None:
        """Check that there is something to measure at each threshold."""
        measure = config.measure
        if measure.sweep is not None and not has_rows(config) and not measure.margin:
            why = "there is nothing to sweep: measure margin, narrow or general"
            raise config.document.problem(("measure", "sweep"), why)

    def check_inputs(self, config: CompareConfig) -> None:
        """Check that both checkpoints exist."""
        from safelora_fast.checkpoints.sources import open_checkpoint

        if config.measure.sweep is not None:
            for role, checkpoint in _pair(config).items():
                open_checkpoint(checkpoint, role=role)

    def applies(self, run: Run, config: CompareConfig) -> bool:
        """Return True for the swept seeds of the first run."""
        section: SweepSection | None = config.measure.sweep
        if section is None or not run.is_of(config.runs[0]):
            return False
        return section.seeds is None or run.seed in section.seeds

    def inputs(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Add the two checkpoints, the thresholds and the measures to the base inputs."""
        measure = bench.config.measure
        pair = _pair(bench.config)
        return {
            **super().inputs(run, bench),
            **(rows_inputs(bench) if has_rows(bench.config) else {}),
            **pair,
            **{f"{role}_sha256": checkpoint_digest(checkpoint) for role, checkpoint in pair.items()},
            **{f"{role}_commit": model_commit(checkpoint) for role, checkpoint in pair.items()},
            "thresholds": sorted(set(measure.sweep.thresholds)),
            "margin": measure.margin,
        }

    def take(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Return the number of projected modules and the measurements at each threshold."""
        from safelora_fast.projection.sweep import sweep_thresholds

        assert run.adapter is not None  # noqa: S101
        folder = run.folder / "thresholds"
        thresholds = bench.config.measure.sweep.thresholds
        aligned, base = _pair(bench.config).values()
        swept = sweep_thresholds(
            run.adapter, aligned=aligned, base=base, thresholds=thresholds, output=folder, overwrite=True
        )
        known: dict[int, dict[str, Any]] = {}  # selections are nested, so equal counts mean equal adapters
        points = []
        for one in swept:
            if one.projected not in known:
                known[one.projected] = _measure(one.folder, bench, f"{run.label}, τ {one.threshold:g}")
            counts = {"threshold": one.threshold, "projected": one.projected, "modules": one.modules}
            points.append({**counts, **known[one.projected]})
        shutil.rmtree(folder)
        return {"points": points}


def _pair(config: CompareConfig) -> dict[str, str]:
    """Return the two checkpoints, by role."""
    section: SweepSection = config.measure.sweep
    return {"aligned": section.aligned or config.recipe["model"]["path"], "base": section.base}


def _measure(adapter: Path, bench: Workbench, label: str) -> dict[str, Any]:
    subject = bench.another(adapter)
    found: dict[str, Any] = {}
    if bench.config.measure.margin:
        found["margin"] = checked(measure_margin(subject, bench, label))
    if has_rows(bench.config):
        found["drift"] = checked(measure_drift(subject, bench, label))
    return found


def points_of_sweep(found: Measurements) -> tuple[SweepPoint, ...]:
    """Return the report's points, as means over the swept seeds."""
    asked = [run for run in found.first if found.applies("sweep", run)]
    contents = {run: found.content("sweep", run) for run in asked}
    swept = [content["points"] for content in contents.values() if FAILURE not in content]
    points = []
    for index, first in enumerate(swept[0] if swept else ()):
        cells = {}
        for metric in found.metrics:
            name = found.measure_of(metric).name
            if name in first:
                parts = {
                    run: content if FAILURE in content else content["points"][index][name]
                    for run, content in contents.items()
                }
                cells[metric.column.key] = found.cell(metric, parts, found.source("sweep"))
        projected = sum(one[index]["projected"] for one in swept) / len(swept)
        points.append(SweepPoint(first["threshold"], projected, first["modules"], cells))
    return tuple(points)
