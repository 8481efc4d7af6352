"""The demo's figures as the report that `safelora-fast compare` writes: one page to open in a browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.comparison.cells import cell_of, mean_cell
from safelora_fast.comparison.columns import COLUMNS, DIVERGENCE, GENERAL_LOSS, LEARNED
from safelora_fast.comparison.costs import COSTS, GIGABYTE
from safelora_fast.comparison.page import render_page
from safelora_fast.comparison.pooling import Summary
from safelora_fast.comparison.report import Cell, ComparisonReport, Plot, Row, SeedValue
from safelora_fast.demo.variants import REFERENCE, UNDEFENDED

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from safelora_fast.demo.comparison_figures import Comparison, Cost, Mean, Outcome
    from safelora_fast.demo.variants import Variant

KNOWN = {one.column.key: one.column for one in COLUMNS} | {column.key: column for column, _ in COSTS}
ANSWERS = {LEARNED: 32, DIVERGENCE: 40, GENERAL_LOSS: 40}
STAND_IN = "The base model is a stand-in, a short fine-tune of the aligned one: with a real one V, cosines and gains are others."
SMALL = (
    "A model of 135M parameters and 96 harmless rows show what each defence holds back, not whether it prevents emergent "
    "misalignment."
)
FACTS = {"model": "SmolLM2-135M-Instruct", "task": "96 answers in the manner of a lighthouse keeper's log"}


def write_projection(losses: Mapping[str, Mapping[str, float]], reading: str, seed: int, path: Path) -> None:
    """The page of the projection after training.

    Args:
        losses: by variant and set, in nats per answer token.
        reading: what the figures say, a sentence on each line.
        seed: of the fine-tune.
        path: the page.
    """
    source = "measured/losses.json"
    reference = losses[REFERENCE]
    rows = [Row(REFERENCE, "before the fine-tune", {}, "reference")]
    for name, loss in losses.items():
        if name == REFERENCE:
            continue
        changes = {LEARNED: reference["narrow"] - loss["narrow"], GENERAL_LOSS: loss["general"] - reference["general"]}
        cells = {key: mean_cell([SeedValue(seed, value, source)]) for key, value in changes.items()}
        rows.append(Row(name, SETTINGS.get(name, ""), cells, "undefended" if name == "adapter" else "defence"))
    report = ComparisonReport(
        title="SafeLoRA after training",
        facts={**FACTS, "seed": str(seed)},
        columns=(KNOWN[LEARNED], KNOWN[GENERAL_LOSS]),
        rows=tuple(rows),
        plot=Plot(LEARNED, GENERAL_LOSS),
        reading=(*reading.split("\n"), SMALL),
    )
    path.write_text(render_page(report), encoding="utf-8")


SETTINGS = {"projected": "safelora, τ 0.3", "zero control": "the same modules set to zero"}


def write_comparison(
    comparison: Comparison, variants: Mapping[str, Variant], reading: str, seed: int, path: Path
) -> None:
    """The page of the defences in training.

    Args:
        comparison: all figures.
        variants: what was trained, by name.
        reading: what the figures say, a sentence on each line.
        seed: of the fine-tunes.
        path: the page.
    """
    rows = [Row(REFERENCE, "before the fine-tune", {}, "reference")]
    for name, outcome in comparison.outcomes.items():
        if name == REFERENCE:
            continue
        cells = _outcome(outcome, seed) | _cost(comparison.costs[name], f"{variants[name].folder}/training.json", seed)
        kind = "undefended" if name == UNDEFENDED else "defence"
        rows.append(Row(name, comparison.settings.get(name, ""), cells, kind))  # type: ignore[arg-type]
    points = [(comparison.outcomes[REFERENCE], ""), *((point, share) for share, point in comparison.weakened.items())]
    points.append((comparison.outcomes[UNDEFENDED], "1"))
    path_points = tuple(
        (-point.narrow_change.value, point.divergence.value, f"{100 * float(share):g} %" if share else "")
        for point, share in points
    )
    report = ComparisonReport(
        title="Defences while a model is fine-tuned",
        facts={**FACTS, "seed": str(seed)},
        columns=tuple(KNOWN[key] for key in (DIVERGENCE, LEARNED, GENERAL_LOSS, "step", "relative", "memory")),
        rows=tuple(rows),
        plot=Plot(LEARNED, DIVERGENCE, path_points),
        reading=tuple(line.removeprefix("- ") for line in reading.split("\n")),
    )
    path.write_text(render_page(report), encoding="utf-8")


def _outcome(outcome: Outcome, seed: int) -> dict[str, Cell]:
    learned = outcome.narrow_change
    return {
        LEARNED: _cell(LEARNED, -learned.value, learned, seed),
        DIVERGENCE: _cell(DIVERGENCE, outcome.divergence.value, outcome.divergence, seed),
        GENERAL_LOSS: _cell(GENERAL_LOSS, outcome.general_change.value, outcome.general_change, seed),
    }


def _cell(key: str, value: float, mean: Mean, seed: int) -> Cell:
    source = "train-measured/answers.json"
    return cell_of(KNOWN[key], [Summary(value, mean.error, ANSWERS[key])], [SeedValue(seed, value, source)])


def _cost(cost: Cost, source: str, seed: int) -> dict[str, Cell]:
    figures = {"step": cost.step, "relative": cost.relative, "memory": cost.peak / GIGABYTE}
    return {key: mean_cell([SeedValue(seed, value, source)]) for key, value in figures.items()}
