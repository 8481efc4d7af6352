"""A comparison report as Markdown, with the tables of GitHub: all of the page but its pictures."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from safelora_fast.comparison.figures_text import (
    FAILED,
    NOTHING,
    format_figure,
    format_heading,
    format_incomplete,
    format_interval,
    format_projected,
    format_run,
    format_runs,
    one_line,
)
from safelora_fast.comparison.origins import failures, files, has_any, link, runs, sweep_columns
from safelora_fast.comparison.report import CRITERIA

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from safelora_fast.comparison.origins import Origin
    from safelora_fast.comparison.report import Cell, Column, ComparisonReport, Row, SeedValue


def render_markdown(report: ComparisonReport) -> str:
    """The whole report; the same report gives the same text.

    Every text of the report is escaped, whatever it holds, so that it stays text and in its cell.
    """
    judged = [column for column in report.columns if column.criterion != "cost"]
    cost = [column for column in report.columns if column.criterion == "cost"]
    missing = failures(report)
    sections = [
        [f"# {escaped(report.title)}"],
        [f"**{format_incomplete(missing)}**"] if not report.complete else [],
        _bullets(map(escaped, report.reading)),
        _facts(report),
        _titled("What each defence prevents, allows and keeps", _outcomes(report.rows, judged)),
        _notes(judged),
        _titled("Failed runs", _missing(one for one in missing if not one.pending)),
        _titled("Not done yet", _missing(one for one in missing if one.pending)),
        _titled("SafeLoRA by threshold", _sweep(report)),
        _titled("What each defence costs", _outcomes(report.rows, cost)),
        _notes(cost),
        _titled("Every run", _runs(report)),
        _titled("Files", _files(report)),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def escaped(text: str) -> str:
    """A text that Markdown shows as it is, in one line."""
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]#|~$!@])", r"\\\1", line)
    return re.sub(r"^(\d+)([.)])(?=\s|$)|^([-+=])", lambda found: f"{found[1] or ''}\\{found[2] or found[3]}", line)


def _titled(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines] if lines else []


def _bullets(items: Iterable[str]) -> list[str]:
    return [f"- {item}" for item in items]


def _facts(report: ComparisonReport) -> list[str]:
    if not report.facts:
        return []
    return _table(["", ""], [[escaped(label), escaped(fact)] for label, fact in report.facts.items()], right=0)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: int) -> list[str]:
    """A table whose last columns, `right` of them, are set to the right."""
    rules = ["---"] * (len(headings) - right) + ["---:"] * right
    return [f"| {' | '.join(cells)} |" for cells in (headings, rules, *rows)]


def _outcomes(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    rows = [row for row in rows if has_any(row, columns)]
    if not rows:
        return []
    headings, criterion = [""], None
    for column in columns:
        group = f"*{CRITERIA[column.criterion]}*<br>" if column.criterion not in {criterion, "cost"} else ""
        headings.append(group + escaped(format_heading(column)))
        criterion = column.criterion
    body = [[_name(row), *(_cell(row.cells.get(column.key), column) for column in columns)] for row in rows]
    return _table(headings, body, right=len(columns))


def _name(row: Row) -> str:
    return f"**{escaped(row.name)}**" + (f"<br>{escaped(row.setting)}" if row.setting else "")


def _cell(cell: Cell | None, column: Column) -> str:
    figure = format_figure(cell, column)
    if cell is None:
        return figure
    figure = f"**{FAILED}**" if figure == FAILED else figure
    interval = format_interval(cell.low, cell.high, column.unit)
    return "<br>".join(part for part in (figure, interval, format_runs(cell), escaped(cell.count)) if part)


def _notes(columns: Sequence[Column]) -> list[str]:
    if not columns:
        return []
    arrows = "In brackets 95 % intervals. ↓: lower is better, ↑: higher is better."
    notes = (f"- {escaped(column.title)}: {escaped(column.note)}" for column in columns if column.note)
    return [arrows, "", *notes]


def _missing(origins: Iterable[Origin]) -> list[str]:
    return _bullets(
        f"{escaped(one.place)}, seed {one.seed}: {escaped(one.what)} ({escaped(one.scope)})" for one in origins
    )


def _sweep(report: ComparisonReport) -> list[str]:
    if not report.sweep:
        return []
    columns = sweep_columns(report)
    headings = ["τ", "projected modules", *(escaped(format_heading(column)) for column in columns)]
    body = [
        [
            f"{point.threshold:g}",
            format_projected(point),
            *(_cell(point.cells.get(column.key), column) for column in columns),
        ]
        for point in report.sweep
    ]
    return _table(headings, body, right=len(headings))


def _runs(report: ComparisonReport) -> list[str]:
    columns = report.columns
    body = [
        [escaped(row.name), str(seed), *(_linked(figures.get(column.key), column) for column in columns)]
        for row in report.rows
        for seed, figures in runs(row).items()
    ]
    headings = ["", "seed", *(escaped(column.title) for column in columns)]
    return _table(headings, body, right=len(columns) + 1) if body else []


def _linked(seed: SeedValue | None, column: Column) -> str:
    if seed is None:
        return NOTHING
    text = format_run(seed, column)
    return f"[{text}]({link(seed.source)})" if seed.source else text


def _files(report: ComparisonReport) -> list[str]:
    return _bullets(
        f"{escaped(one.place)}, seed {one.seed}: [{escaped(one.what)}]({link(one.what)}) ({escaped(one.scope)})"
        for one in files(report)
    )
