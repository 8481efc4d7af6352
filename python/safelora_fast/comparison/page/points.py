"""The rows of a comparison as points of a plot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_fast.comparison.figures_text import format_quantity, is_figure
from safelora_fast.comparison.page.marks import styles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safelora_fast.comparison.page.marks import Style
    from safelora_fast.comparison.report import Cell, Column, ComparisonReport, Row


@dataclass(frozen=True)
class Point:
    """A row in a plot, in the values that its axes show.

    Attributes:
        row: the row itself, with its style.
        x, y: the means.
        across, up: their intervals; where there is none, the mean twice.
        runs: those that have both.
        tip: the figures in words.
    """

    row: Row
    style: Style
    x: float
    y: float
    across: tuple[float, float]
    up: tuple[float, float]
    runs: tuple[tuple[float, float], ...]
    tip: str


def shown(value: float, column: Column) -> float:
    """A value as an axis has it: shares in per cent."""
    return 100 * value if column.unit == "%" else value


def interval(cell: Cell, column: Column) -> tuple[float, float] | None:
    """Both ends as an axis has them; None where one is missing."""
    if not (is_figure(cell.low) and is_figure(cell.high)):
        return None
    return shown(cell.low, column), shown(cell.high, column)


def points(report: ComparisonReport, x: Column, y: Column) -> Iterator[Point]:
    """The rows that have both measures."""
    for row, style in zip(report.rows, styles(report.rows), strict=True):
        across, up = row.cells.get(x.key), row.cells.get(y.key)
        if across is None or up is None or not (is_figure(across.value) and is_figure(up.value)):
            continue
        place = shown(across.value, x), shown(up.value, y)
        figures = ", ".join(
            f"{column.title} {format_quantity(cell.value, column.unit)}" for column, cell in ((x, across), (y, up))
        )
        yield Point(
            row,
            style,
            *place,
            interval(across, x) or (place[0], place[0]),
            interval(up, y) or (place[1], place[1]),
            tuple(_runs(across, up, x, y)),
            f"{row.name}: {figures}",
        )


def _runs(across: Cell, up: Cell, x: Column, y: Column) -> Iterator[tuple[float, float]]:
    of_seed = {run.seed: run.value for run in up.seeds if is_figure(run.value)}
    for run in across.seeds:
        if is_figure(run.value) and run.seed in of_seed:
            yield shown(run.value, x), shown(of_seed[run.seed], y)
