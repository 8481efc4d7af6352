"""One cell of a table, and what opens from it: its runs one by one, with the files that they came from."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from safelora_fast.comparison.figures_text import (
    FAILED,
    NOTHING,
    format_figure,
    format_interval,
    format_run,
    format_runs,
    is_figure,
)
from safelora_fast.comparison.origins import link
from safelora_fast.comparison.page.markup import Markup, element, foreign, join

if TYPE_CHECKING:
    from safelora_fast.comparison.report import Cell, Column, SeedValue

WAITING = "waiting"


def figure_cell(cell: Cell | None, column: Column, place: str, identity: str) -> Markup:
    """A cell with its interval, what it is a share of, and how many of its runs it is made of.

    Args:
        cell: None where the measure was not asked for.
        column: of the cell.
        place: name of its row.
        identity: of what opens from it, unique on the page.
    """
    if cell is None:
        return element("td", NOTHING, class_="absent")
    figure = format_figure(cell, column)
    shown: list[Markup | None] = [_button(figure, identity) if cell.seeds else element("span", figure, class_="figure")]
    interval = format_interval(cell.low, cell.high, column.unit)
    partial = WAITING if all(seed.pending for seed in cell.failures) else "partial"
    for text, class_ in ((interval, "interval"), (format_runs(cell), partial)):
        shown.append(element("span", text, class_=class_) if text else None)
    if cell.count:
        clauses = re.split(r"(?<=[,;]) ", cell.count)  # broken between these first
        shown.append(element("span", join([element("span", clause) for clause in clauses], " "), class_="count"))
    if cell.seeds:
        shown.append(_card(cell, column, place, identity))
    value = repr(cell.value) if is_figure(cell.value) else None
    kind = None if value is not None or not cell.failures else FAILED if figure == FAILED else WAITING
    return element("td", *shown, class_=kind, data_value=value)


def run_cell(seed: SeedValue | None, column: Column) -> Markup:
    """What one run came to, linked to its file."""
    if seed is None:
        return element("td", NOTHING, class_="absent")
    text = format_run(seed, column).removesuffix(column.unit).rstrip()
    value = repr(seed.value) if is_figure(seed.value) and seed.failure is None else None
    shown = element("a", text, href=link(seed.source)) if seed.source else text
    return element("td", shown, class_=_class(seed), data_value=value)


def _class(seed: SeedValue) -> str | None:
    return None if seed.failure is None else WAITING if seed.pending else FAILED


def _button(figure: str, identity: str) -> Markup:
    words = element("span", "✕ ", aria_hidden="true") if figure == FAILED else None
    return element("button", words, figure, class_="figure", type="button", popovertarget=identity)


def _card(cell: Cell, column: Column, place: str, identity: str) -> Markup:
    heading = element("p", foreign(place), ": ", foreign(column.title), class_="where")
    runs = element("ul", *(_run(seed, column) for seed in cell.seeds))
    return element("div", heading, runs, class_="card", id=identity, popover=True)


def _run(seed: SeedValue, column: Column) -> Markup:
    reason = f"{FAILED}: {seed.failure}" if _class(seed) == FAILED else seed.failure
    figure = element("span", reason or format_run(seed, column), class_=_class(seed))
    source = element("a", foreign(seed.source), href=link(seed.source)) if seed.source else "no file"
    return element("li", element("b", f"seed {seed.seed}"), join([figure, element("span", source)]))
