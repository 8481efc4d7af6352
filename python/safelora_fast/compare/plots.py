"""The plots of a comparison, drawn by matplotlib: learning against drift, and SafeLoRA by threshold.

Each is an SVG for an HTML page, with the colors of its style sheet in the place of fixed ones, so that it follows light and dark.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from safelora_fast.compare.cell_sources import sweep_columns
from safelora_fast.compare.number_text import (
    format_direction,
    format_heading,
    format_quantity,
    is_figure,
    one_line,
)
from safelora_fast.plotting import COLORS, DISTANCES, MARKERS, page_drawing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from safelora_fast.compare.report import Cell, Column, ComparisonReport, Row

SHAPES = "●■▲◆▼✚✖"  # MARKERS as characters, for tables; page.css has COLORS as --c0 to --c6
MEAN, RUN, STEP = 10.0, 4.5, 5.0  # diameters of the marks of a row's mean, of one run, and of a point of the path
WIDE, NARROW, PANEL = (860, 500, 13), (340, 400, 12), (268, 186, 12)  # width, height, size of the text
LEVELS = {"reference", "undefended"}  # kinds of rows whose values are levels in the plots of the sweep


@cache
def palette() -> dict[str, str]:
    """The colors of page.css on a light screen, as #rrggbb, by name."""
    css = files("safelora_fast.compare").joinpath("templates/page.css").read_text("utf-8")
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", css[: css.index("}")]))


@dataclass(frozen=True)
class Style:
    """How the marks of a row look: the name of a color of page.css, and the place of a shape in MARKERS and SHAPES."""

    color: str
    shape: int

    @property
    def character(self) -> str:
        """The mark as a character."""
        return SHAPES[self.shape]


def styles(rows: Iterable[Row]) -> list[Style]:
    """A style for each row: gray for the reference; beyond seven the colors come again with other shapes."""
    found, count = [], 0
    for row in rows:
        if row.kind == "reference":
            found.append(Style("reference", 0))
        else:
            found.append(Style(f"c{count % len(COLORS)}", (count + count // len(COLORS)) % len(MARKERS)))
            count += 1
    return found


@dataclass(frozen=True)
class Point:
    """A row in a plot, in the units of the axes (shares in percent): its means, their intervals, and single runs."""

    row: Row
    style: Style
    x: float
    y: float
    across: tuple[float, float]
    up: tuple[float, float]
    runs: tuple[tuple[float, float], ...]
    tip: str


@dataclass(frozen=True)
class LearningPlot:
    """Learning against drift: the drawings, and what stands beside them.

    Attributes:
        wide, narrow: the drawing for each width of the screen.
        points: the rows that are shown.
        missing: names of the rows that are not, for want of a value.
        named: whether the wide drawing has every name in full.
        words: how to read it.
    """

    wide: str
    narrow: str
    points: tuple[Point, ...]
    missing: tuple[str, ...]
    named: bool
    words: str


def learning_plot(report: ComparisonReport) -> LearningPlot | None:
    """The plot; None where the report has none, or no row with both measures."""
    columns = {column.key: column for column in report.columns}
    if report.plot is None or not {report.plot.x, report.plot.y} <= columns.keys():
        return None
    x, y = columns[report.plot.x], columns[report.plot.y]
    points = tuple(_points(report, x, y))
    if not points:
        return None
    path = list(_path(report, x, y))
    (wide, named), (narrow, _) = (
        _learning(identity, sheet, points, path, x, y) for identity, sheet in (("wide", WIDE), ("narrow", NARROW))
    )
    absent = (row for row in report.rows if all(row is not point.row for point in points))
    missing = tuple(row.name for row in absent if not (path and row.kind == "reference"))
    words = "Large marks are means over the runs, small ones the runs, lines 95 % intervals."
    if path:
        words += " Dashed: the undefended update scaled down, from all of it to none."
    if x.better and y.better:
        words += f" Further {'down' if y.better == 'lower' else 'up'} and to the right is better."
    return LearningPlot(wide, narrow, points, missing, named, words)


def sweep_plots(report: ComparisonReport) -> Iterator[tuple[str, str]]:
    """SafeLoRA by threshold: the number of projected modules, then each measure; a title and a drawing each."""
    modules = max((point.modules for point in report.sweep), default=0)
    projected = [(point.threshold, point.projected, None) for point in report.sweep if is_figure(point.projected)]
    yield _panel(0, f"modules projected, of {modules}", projected, {}, (0.0, float(modules)))
    for number, column in enumerate(sweep_columns(report), 1):
        cells = [(point.threshold, point.cells.get(column.key)) for point in report.sweep]
        curve = [
            (threshold, _shown(cell.value, column), _interval(cell, column))
            for threshold, cell in cells
            if cell is not None and is_figure(cell.value)
        ]
        levels = {
            row.name: _shown(cell.value, column)
            for row in report.rows
            if row.kind in LEVELS and (cell := row.cells.get(column.key)) is not None and is_figure(cell.value)
        }
        yield _panel(number, format_heading(column), curve, levels, ())


def _shown(value: float, column: Column) -> float:
    return 100 * value if column.unit == "%" else value


def _interval(cell: Cell, column: Column) -> tuple[float, float] | None:
    if not (is_figure(cell.low) and is_figure(cell.high)):
        return None
    return _shown(cell.low, column), _shown(cell.high, column)


def _points(report: ComparisonReport, x: Column, y: Column) -> Iterator[Point]:
    for row, style in zip(report.rows, styles(report.rows), strict=True):
        across, up = row.cells.get(x.key), row.cells.get(y.key)
        if across is None or up is None or not (is_figure(across.value) and is_figure(up.value)):
            continue
        place = _shown(across.value, x), _shown(up.value, y)
        values = (
            f"{column.title} {format_quantity(cell.value, column.unit)}" for column, cell in ((x, across), (y, up))
        )
        ends = _interval(across, x) or (place[0], place[0]), _interval(up, y) or (place[1], place[1])
        heights = {run.seed: run.value for run in up.seeds if is_figure(run.value)}
        runs = tuple(
            (_shown(run.value, x), _shown(heights[run.seed], y))
            for run in across.seeds
            if is_figure(run.value) and run.seed in heights
        )
        yield Point(row, style, *place, *ends, runs, f"{row.name}: {', '.join(values)}")


def _path(report: ComparisonReport, x: Column, y: Column) -> Iterator[tuple[float, float, str]]:
    """The undefended update as it is scaled down; its first point, if it has no name, has the reference's."""
    reference = next((row.name for row in report.rows if row.kind == "reference"), "")
    for place, (across, up, label) in enumerate(report.plot.path if report.plot else ()):
        if is_figure(across) and is_figure(up):
            yield _shown(across, x), _shown(up, y), label or (reference if place == 0 else "")


def _learning(
    identity: str,
    sheet: tuple[int, int, int],
    points: Sequence[Point],
    path: Sequence[tuple[float, float, str]],
    x: Column,
    y: Column,
) -> tuple[str, bool]:
    """The drawing, and whether it has every name in full."""
    label = f"{y.title} against {x.title}; every value is in the tables"
    with page_drawing(identity, label, palette(), *sheet) as drawn:
        axes, width = drawn.axes, sheet[0] // sheet[2] * 2  # characters are about half as wide as high
        if x.better == "lower":
            axes.invert_xaxis()
        axes.set_xlabel(textwrap.fill(_axis_title(x), width, max_lines=3, placeholder="…"))
        axes.set_title(textwrap.fill(_axis_title(y), width, max_lines=3, placeholder="…"))
        if path:
            across, up, _ = zip(*path, strict=True)
            axes.plot(across, up, color=palette()["muted"], linestyle=(0, (4, 3)), linewidth=1.3)
        for step_x, step_y, name in path:
            drawn.mark((step_x, step_y), "o", STEP, "page", "muted", "step", tip=name)
        for point in points:
            marker, color, edge = MARKERS[point.style.shape], point.style.color, f"{point.style.color}-edge"
            for line in ((point.across, (point.y, point.y)), ((point.x, point.x), point.up)):
                axes.plot(*line, color=palette()[edge], linewidth=1.2, alpha=0.75)
            for run in point.runs:
                drawn.mark(run, marker, RUN, color, edge, "run", alpha=0.5)
        for point in points:
            marker, color, edge = MARKERS[point.style.shape], point.style.color, f"{point.style.color}-edge"
            drawn.mark((point.x, point.y), marker, MEAN, color, edge, "mark", tip=point.tip, zorder=3)
        named = drawn.write_names([((point.x, point.y), point.row.name) for point in points], "name")
        drawn.write_names(
            [((across, up), name) for across, up, name in path if name], "step-name", farthest=DISTANCES[1]
        )
    return drawn.markup, named


def _axis_title(column: Column) -> str:
    """Title, unit and the good direction in words."""
    unit = f" ({column.unit})" if column.unit else ""
    return one_line(f"{column.title}{unit}") + (f", {format_direction(column)}" if column.better else "")


def _panel(
    number: int,
    title: str,
    curve: Sequence[tuple[float, float, tuple[float, float] | None]],
    levels: dict[str, float],
    extent: Sequence[float],
) -> tuple[str, str]:
    """A measure by threshold, with the values of some rows as levels."""
    label = f"{title} by threshold; every value is in the table"
    with page_drawing(f"sweep-{number}", label, palette(), *PANEL) as drawn:
        axes, edge = drawn.axes, palette()["c0-edge"]
        axes.set_xlabel("τ")
        places = [place for place, _, _ in curve]
        axes.plot(places, [value for _, value, _ in curve], color=edge, linewidth=1.5)
        ends = [(place, both) for place, _, both in curve if both is not None]
        if len(ends) > 1:
            low, high = ([both[end] for _, both in ends] for end in (0, 1))
            axes.fill_between([place for place, _ in ends], low, high, color=palette()["c0"], alpha=0.15, linewidth=0)
        for place, value, _ in curve:
            drawn.mark((place, value), "o", RUN, "c0", "c0-edge", "point")
        axes.update_datalim([(place, value) for place in places[:1] for value in extent])
        axes.autoscale_view()
        for name, value in levels.items():
            axes.axhline(value, color=palette()["muted"], linestyle=(0, (2, 3)), linewidth=1)
            # At the end of the line from which the curve is farther away.
            at_start = bool(curve) and abs(curve[0][1] - value) > abs(curve[-1][1] - value)
            axes.annotate(
                textwrap.shorten(one_line(name), 20, placeholder="…"), (0.01 if at_start else 0.99, value),
                xycoords=axes.get_yaxis_transform(), textcoords="offset pixels", xytext=(0, 2), va="bottom",
                ha="left" if at_start else "right", gid=f"level-name:{name}", in_layout=False,
            )  # fmt: skip
    return title, drawn.markup
