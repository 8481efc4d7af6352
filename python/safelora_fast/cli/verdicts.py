"""Tables of verdicts and benchmark results. Every rate shows its counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from safelora_fast.cli.console import figure_table, out, short, warn

if TYPE_CHECKING:
    from safelora_fast.judging.benchmark_results import BenchmarkReport

NOTHING_SCORED = 1


def show_judges(reports: dict[str, dict[str, Any]], *, kinds: bool = False) -> None:
    """Print one row per judge and, with `kinds`, one per kind of question."""
    from safelora_fast.judging.judge import NO_ANSWER, UNFINISHED

    table = figure_table("judge", "answers", "unscored", "misaligned of scored", "incoherent of scored")
    for judge, report in reports.items():
        table.add_row(short(judge), *_cells(report))
        if kinds and len(report["kinds"]) > 1:
            for kind, rates in report["kinds"].items():
                table.add_row(f"  {kind}", *_cells(rates))
    out.print(table)
    for judge, report in reports.items():
        for reason, count in report["unscored"].items():
            example = report["unscored_examples"].get(reason)
            text = "" if example is None else f", e.g. {example[:80]!r}"
            out.print(f"{short(judge)}: {count} unscored: {reason}{text}", soft_wrap=True, markup=False)
        if report["left_out"]:
            out.print(f"{short(judge)}: its endpoint refuses {', '.join(report['left_out'])}, and was asked without")
        low, high = report["misaligned_bounds"] or (0.0, 0.0)
        if report["unscored"]:
            out.print(f"with the unscored answers, misaligned are {100 * low:.1f} to {100 * high:.1f} % of all")
    if any(reason not in {NO_ANSWER, UNFINISHED} for report in reports.values() for reason in report["unscored"]):
        out.print("a second run asks about unscored answers again")
    out.print("in parentheses 95 % intervals, answers to one question taken together", markup=False)


def end_where_nothing_is_scored(reports: dict[str, dict[str, Any]]) -> None:
    """Exit with code 1 if a judge scored none of the answers, because there is no rate then."""
    silent = [judge for judge, report in reports.items() if report["answers"] and not report["scored"]]
    for judge in silent:
        warn(f"{judge} scored none of the answers")
    if silent:
        raise typer.Exit(NOTHING_SCORED)


def show_benchmarks(report: BenchmarkReport) -> None:
    """Print one row per metric of each task."""
    table = Table(box=None, pad_edge=False)
    for column in ("task", "metric", "value", "± standard error", "documents", "better"):
        is_number = column in {"value", "± standard error", "documents"}
        table.add_column(column, justify="right" if is_number else "left", no_wrap=True)
    for result in report.tasks:
        for metric in result.metrics:
            table.add_row(
                short(result.task) if metric is result.main else "",
                metric.label,
                _or_dash(metric.value, ".4g"),
                _or_dash(metric.stderr, ".2g"),
                str(metric.count),
                {True: "higher", False: "lower", None: "–"}[metric.higher_is_better],
            )
    out.print(table)


def show_agreement(pairs: list[dict[str, Any]]) -> None:
    """Print one row per pair of judges."""
    table = figure_table("agreement of", "both scored", "same verdict", "κ misaligned", "ρ alignment", "ρ coherence")
    for pair in pairs:
        same = "–" if pair["same_verdict"] is None else f"{100 * pair['same_verdict']:.1f} %"
        table.add_row(
            " and ".join(short(judge, 32) for judge in pair["judges"]),
            f"{pair['both_scored']} of {pair['answers']}",
            same,
            *(_or_dash(pair[name], ".3f") for name in ("kappa", "spearman_alignment", "spearman_coherence")),
        )
    out.print(table)


def _cells(rates: dict[str, Any]) -> list[str]:
    unscored = rates["answers"] - rates["scored"]
    return [str(rates["answers"]), str(unscored), *(_rate(rates[name]) for name in ("misaligned", "incoherent"))]


def _rate(rate: dict[str, Any]) -> str:
    if rate["share"] is None:
        return "–"
    low, high = rate["interval"]
    return f"{rate['hits']}/{rate['count']} = {100 * rate['share']:.1f} % ({100 * low:.1f}–{100 * high:.1f})"


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
