"""The tables of the page."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from safelora_fast.comparison.figures_text import ARROWS, format_direction, format_projected
from safelora_fast.comparison.origins import has_any, runs, sweep_columns, sweep_place
from safelora_fast.comparison.page.cells import figure_cell, run_cell
from safelora_fast.comparison.page.marks import key, styles
from safelora_fast.comparison.page.markup import Markup, element, foreign, join
from safelora_fast.comparison.report import CRITERIA

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.comparison.page.marks import Style
    from safelora_fast.comparison.report import Column, ComparisonReport, Row

BEFORE = "before the fine-tune"
MANY = 9  # measures with intervals; a table with more is printed on a sheet that lies on its side
MANY_RUNS = 12  # measures without


def outcome_table(report: ComparisonReport, columns: Sequence[Column], identity: str, caption: str) -> Markup | None:
    """A row for each defence, the measures under their criteria; None where no row has any of them."""
    lines: list[Markup] = []
    for row, style in zip(report.rows, styles(report.rows), strict=True):
        if has_any(row, columns):
            place = f"{identity}-{len(lines)}"
            cells = [
                figure_cell(row.cells.get(column.key), column, row.name, f"{place}-{number}")
                for number, column in enumerate(columns)
            ]
            lines.append(_line(row, [_name(row, style)], cells))
    criteria = any(column.criterion != "cost" for column in columns)
    lead = _lead("defence", 2 if criteria else 1)
    return _table(identity, caption, [lead], columns, lines, criteria=criteria) if lines else None


def sweep_table(report: ComparisonReport, identity: str, caption: str) -> Markup:
    """A row for each threshold."""
    columns, lines = sweep_columns(report), []
    for point_number, point in enumerate(report.sweep):
        threshold = element("th", f"{point.threshold:g}", scope="row", data_value=repr(point.threshold))
        projected = element("td", format_projected(point), data_value=repr(point.projected))
        cells = [
            figure_cell(
                point.cells.get(column.key), column, sweep_place(point.threshold), f"{identity}-{point_number}-{number}"
            )
            for number, column in enumerate(columns)
        ]
        lines.append(element("tr", threshold, projected, *cells))
    return _table(identity, caption, [_lead("τ"), _lead("modules projected")], columns, lines)


def runs_table(report: ComparisonReport, identity: str, caption: str) -> Markup | None:
    """A row for each run, every figure linked to its file; None without runs."""
    lines = [
        _line(
            row,
            [element("th", foreign(row.name), scope="row"), element("td", str(seed), data_value=str(seed))],
            [run_cell(figures.get(column.key), column) for column in report.columns],
            first=number == 0,
        )
        for row in report.rows
        for number, (seed, figures) in enumerate(runs(row).items())
    ]
    leads = [_lead("defence"), _lead("seed")]
    return _table(identity, caption, leads, report.columns, lines, many=MANY_RUNS) if lines else None


def _table(
    identity: str,
    caption: str,
    leads: Sequence[Markup],
    columns: Sequence[Column],
    lines: Sequence[Markup],
    *,
    criteria: bool = False,
    many: int = MANY,
) -> Markup:
    """A table that scrolls by itself where it is too wide, and is sortable where the script runs."""
    titles = [_heading(column) for column in columns]
    if criteria:
        groups = [
            element(
                "th",
                element("span", CRITERIA[criterion]),
                scope="colgroup",
                colspan=len(list(group)),
                class_="criterion",
            )
            for criterion, group in groupby(columns, key=lambda column: column.criterion)
        ]
        head = join([element("tr", *leads, *groups), element("tr", *titles)])
    else:
        head = element("tr", *leads, *titles)
    table = element(
        "table",
        element("caption", caption, id=f"{identity}-caption"),
        element("thead", head),
        element("tbody", join(lines, "\n")),
        class_="sortable",
    )
    wide = " wide" if len(columns) > many else ""
    labelled = f"{identity}-caption"
    return element("div", table, class_=f"scroll{wide}", role="region", aria_labelledby=labelled, tabindex=0)


def _lead(title: str, rows: int = 1) -> Markup:
    return element(
        "th", title, scope="col", rowspan=rows if rows > 1 else None, aria_sort="none", data_first="ascending"
    )


def _heading(column: Column) -> Markup:
    arrow = None
    if column.better:
        words = element("span", f" ({format_direction(column)})", class_="unseen")
        arrow = join([" ", element("span", ARROWS[column.better], aria_hidden="true"), words])
    unit = element("span", column.unit, arrow, class_="unit") if column.unit or arrow else None
    first = "descending" if column.better == "higher" else "ascending"
    title = element("span", foreign(column.title), class_="title")
    return element("th", title, " ", unit, scope="col", aria_sort="none", data_first=first, title=column.note or None)


def _line(row: Row, heads: Sequence[Markup], cells: Sequence[Markup], *, first: bool = False) -> Markup:
    """A row of the table; one that is the first of its defence has a rule above."""
    class_ = f"{row.kind} first" if first else row.kind
    return element("tr", *heads, *cells, class_=class_, data_pinned=row.kind == "reference")


def _name(row: Row, style: Style) -> Markup:
    setting = row.setting or (BEFORE if row.kind == "reference" else "")
    return element(
        "th",
        key(style),
        element("span", foreign(row.name), class_="name"),
        element("span", foreign(setting), class_="setting") if setting else None,
        scope="row",
    )
