"""Build a comparison's report from its files, without running anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast.compare.measurements import Measurements
from safelora_fast.compare.measures import MEASURES
from safelora_fast.compare.measures.base import FAILURE
from safelora_fast.compare.measures.drift import DIVERGENCE, LEARNED
from safelora_fast.compare.measures.margin import MARGIN_RISE
from safelora_fast.compare.measures.scaled import path_of_scaled
from safelora_fast.compare.measures.sweep import points_of_sweep
from safelora_fast.compare.report import Cell, Column, ComparisonReport, Failure, Plot, Row, SeedValue
from safelora_fast.compare.report_texts import conclusions, facts_of, setting_of
from safelora_fast.compare.runs import REFERENCE
from safelora_fast.recipe.run_folder import RECORD

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from safelora_fast.compare.runs import Run, RunSpec
    from safelora_fast.compare.workbench import Workbench

LEARNED_SHARE = Column(
    "learned_share", "narrow", "of the first run's", "%", "higher",
    "The same, as a share of what the first run learned.",
)  # fmt: skip
COSTS = (
    Column("step", "cost", "step", "s", "lower", "Median seconds of an optimizer step."),
    Column(
        "relative", "cost", "beside first", "×", "lower", "A step divided by one of the first run with the same seed."
    ),
    Column("seconds", "cost", "training", "s", "lower", "Seconds of the training, from its start to its end."),
    Column(
        "memory", "cost", "peak memory", "GB", "lower", "Peak of the training's own process: on the GPU, else resident."
    ),
)


def make_report(bench: Workbench) -> ComparisonReport:
    """Return the report of everything measured so far."""
    config, found = bench.config, Measurements(bench)
    rows = [_reference(found)]
    for spec in config.runs:
        kind: Any = "undefended" if spec is config.runs[0] else "defense"
        rows.append(Row(spec.name, setting_of(spec), _cells(found, spec, costs=config.measure.costs), kind))
    columns = _columns(found, rows)
    has_plot = found.metric(LEARNED.key) is not None and found.metric(DIVERGENCE.key) is not None
    has_margins = found.metric(LEARNED.key) is not None and found.metric(MARGIN_RISE.key) is not None
    sweep, failed = points_of_sweep(found), tuple(_failures_without_a_cell(found))
    cells = [
        cell for cells in (*(row.cells for row in rows), *(point.cells for point in sweep)) for cell in cells.values()
    ]
    outcomes = {
        name: {metric.column.key: found.outcomes(metric, runs) for metric in found.metrics}
        for name, runs in found.runs.items()
    }
    return ComparisonReport(
        title=config.title,
        facts=facts_of(bench, [found.record(run) for run in found.everything], _row_counts(found, bench)),
        columns=columns,
        rows=tuple(rows),
        plot=Plot(LEARNED.key, DIVERGENCE.key, path_of_scaled(found)) if has_plot else None,
        sweep=sweep,
        failed=failed,
        reading=conclusions(columns, outcomes, seeds=len(config.seeds)),
        margin_plot=Plot(LEARNED.key, MARGIN_RISE.key, path_of_scaled(found, MARGIN_RISE.key)) if has_margins else None,
        complete=not (failed or _any_failure(found) or any(cell.failures for cell in cells)),
    )


def _row_counts(found: Measurements, bench: Workbench) -> dict[str, int]:
    """Return the number of examples of each set: of the files, or of the reference's measurement if they are not here."""
    measured = found.content("drift", found.reference)
    here = {name: len(rows.rows) for name, rows in bench.rows.items()}
    return here | {name: len(measured[name]) for name in bench.row_sources if name not in here and name in measured}


def _any_failure(found: Measurements) -> bool:
    """Return whether any requested measure failed or has not been taken."""
    asked = ((one.name, run) for one in MEASURES for run in found.everything if found.applies(one.name, run))
    return any(FAILURE in found.content(name, run) for name, run in asked)


def _failures_without_a_cell(found: Measurements) -> Iterator[Failure]:
    """Yield the failures of measures that have no columns: whole files and parts of them."""
    with_columns = {found.measure_of(metric).name for metric in found.metrics}
    for measure in MEASURES:
        for run in found.everything if measure.name not in with_columns else ():
            if found.applies(measure.name, run):
                content = found.content(measure.name, run)
                whole = [(measure.title, content[FAILURE])] if FAILURE in content else measure.failed_parts(content)
                for title, reason in whole:
                    yield Failure(run.name, run.seed or 0, title, reason)


def _reference(found: Measurements) -> Row:
    """Return the reference's row; columns that hold differences from the reference are left out."""
    cells = {}
    for metric in found.metrics:
        cell = found.row_cell(metric, [found.reference]) if metric.of_reference else None
        if cell is not None:
            cells[metric.column.key] = cell
    return Row(REFERENCE, "before the fine-tune", cells, "reference")


def _cells(found: Measurements, spec: RunSpec, *, costs: bool) -> dict[str, Cell]:
    runs = found.runs[spec.name]
    cells = {metric.column.key: found.row_cell(metric, runs) for metric in found.metrics}
    extra = _learned_share(found, runs) | (_costs(found, runs) if costs else {})
    return {key: cell for key, cell in cells.items() if cell is not None} | extra


def mean_cell(values: Sequence[SeedValue]) -> Cell:
    """Return the mean over seeds, without an interval, of values that have no items."""
    known = [value.value for value in values if value.value is not None]
    return Cell(sum(known) / len(known) if known else None, None, None, tuple(values))


def _learned_share(found: Measurements, runs: Sequence[Run]) -> dict[str, Cell]:
    """Return each seed's learning divided by the first run's; no value if the first run learned nothing."""
    metric = found.metric(LEARNED.key)
    first = {run.seed: run for run in found.first}
    source, values = found.source("drift"), []
    for run in runs if metric is not None else ():
        if run.seed in first and metric is not None:
            own, other = (found.outcome(metric, one) for one in (run, first[run.seed]))
            value, failure = None, None
            if isinstance(own, str):
                failure = own
            elif isinstance(other, str):
                failure = f"{first[run.seed].name}: {other}"
            elif other.value > 0:
                value = own.value / other.value
            values.append(SeedValue(run.seed or 0, value, source(run), failure))
    return {LEARNED_SHARE.key: mean_cell(values)} if any(one.value is not None or one.failure for one in values) else {}


def costs_of(record: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the costs of a training by column key, in seconds and GB (1e9 bytes).

    Args:
        record: record of the training.
        first: record of the first run's training with the same seed.
    """
    step, first_step = record.get("step_seconds"), first.get("step_seconds")
    peaks = record.get("peak_bytes") or {}
    peak = peaks.get("gpu") or peaks.get("resident")
    return {
        "step": step,
        "relative": step / first_step if step and first_step else None,
        "seconds": record.get("seconds"),
        "memory": peak / 1e9 if peak else None,
    }


def _costs(found: Measurements, runs: Sequence[Run]) -> dict[str, Cell]:
    first = {run.seed: found.record(run) for run in found.first}
    costs = {run: costs_of(found.record(run), first.get(run.seed, {})) for run in runs}
    cells = {}
    for column in COSTS:
        values = [
            SeedValue(run.seed or 0, own[column.key], found.relative(run.adapter / RECORD))
            for run, own in costs.items()
            if own[column.key] is not None and run.adapter is not None
        ]
        if values:
            cells[column.key] = mean_cell(values)
    return cells


def _columns(found: Measurements, rows: Sequence[Row]) -> tuple[Column, ...]:
    """Return the columns of all metrics, plus the derived columns that some row has a cell for."""
    present = {key for row in rows for key in row.cells}
    ordered = []
    for metric in found.metrics:
        ordered.append(metric.column)
        if metric.column.key == LEARNED.key and LEARNED_SHARE.key in present:
            ordered.append(LEARNED_SHARE)
    return (*ordered, *(column for column in COSTS if column.key in present))
