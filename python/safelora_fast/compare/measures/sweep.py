"""SafeLoRA on the first run's adapters at every threshold."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.compare.measures.base import OfTheRun, checked
from safelora_fast.compare.measures.drift import measure_drift, rows_of
from safelora_fast.compare.measures.margin import label, model_of
from safelora_fast.projection.sweep import sweep_thresholds
from safelora_fast.recipe.model_stamp import checkpoint_digest, model_commit
from safelora_fast.scoring.margin import answer_margin

if TYPE_CHECKING:
    from pathlib import Path

    from safelora_fast.compare.measure_sections import SweepSection
    from safelora_fast.compare.paths import Place
    from safelora_fast.compare.shared_models import Workbench


@dataclass(frozen=True)
class SweepMeasure(OfTheRun):
    """Margin and drift at every threshold, from one pass over the two checkpoints."""

    name: str = "sweep"

    def applies(self, place: Place, bench: Workbench) -> bool:
        """The first run's seeds that are swept."""
        sweep = bench.config.measure.sweep
        if sweep is None or place.seed is None or place.name != bench.config.runs[0].name:
            return False
        return sweep.seeds is None or place.seed in sweep.seeds

    def of(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """The model, the adapter, the pair and the thresholds."""
        sweep = _section(bench)
        rows = rows_of(bench) if bench.config.measure.drift else {}
        pair = {"aligned": _aligned(bench), "base": sweep.base}
        weights = {f"{role}_sha256": checkpoint_digest(checkpoint) for role, checkpoint in pair.items()}
        commits = {f"{role}_commit": model_commit(checkpoint) for role, checkpoint in pair.items()}
        chosen = {"thresholds": sorted(set(sweep.thresholds)), "margin": bench.config.measure.margin}
        return {**model_of(place, bench), **rows, **pair, **weights, **commits, **chosen}

    def take(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """By threshold, how many modules are projected, and the measures of the result."""
        assert place.adapter is not None  # noqa: S101
        folder, sweep = place.folder / "thresholds", _section(bench)
        swept = sweep_thresholds(
            place.adapter, aligned=_aligned(bench), base=sweep.base, thresholds=sweep.thresholds, output=folder,
            overwrite=True,
        )  # fmt: skip
        known: dict[int, dict[str, Any]] = {}  # a threshold selects what a lower one does: equal counts, equal adapters
        points = []
        for one in swept:
            if one.projected not in known:
                known[one.projected] = _measure(one.folder, bench, f"{label(place)}, τ {one.threshold:g}")
            points.append(
                {"threshold": one.threshold, "projected": one.projected, "modules": one.modules, **known[one.projected]}
            )
        shutil.rmtree(folder)
        return {"points": points}


def _section(bench: Workbench) -> SweepSection:
    section = bench.config.measure.sweep
    assert section is not None  # noqa: S101
    return section


def _aligned(bench: Workbench) -> str:
    return _section(bench).aligned or bench.settings.model


def _measure(adapter: Path, bench: Workbench, of: str) -> dict[str, Any]:
    subject = bench.another(adapter)
    found: dict[str, Any] = {}
    if bench.config.measure.margin:
        report = answer_margin(subject.model, subject.tokenizer, strings=bench.strings)
        found["margin"] = checked(report.to_dict())
    if bench.config.measure.drift:
        found["drift"] = checked(measure_drift(subject, bench, of))
    return found
