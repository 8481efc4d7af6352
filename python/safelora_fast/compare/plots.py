"""The plots of a comparison: learning against drift, and SafeLoRA by threshold.

Each plot is an SVG for the HTML page. It uses the color variables of the page's style sheet, so it follows light and
dark mode.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from safelora_fast.compare.cell_sources import sweep_columns
from safelora_fast.compare.words import format_quantity, is_value, words
from safelora_fast.plotting import COLORS, DISTANCES, MARKERS, page_drawing
from safelora_fast.printable import without_controls

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from safelora_fast.compare.report import Cell, Column, ComparisonReport, Plot, Row

SHAPES = "●■▲◆▼✚✖"  # MARKERS as characters, for tables; page.css has COLORS as --c0 to --c6
MEAN, RUN, STEP = 10.0, 4.5, 5.0  # mark diameters: a row's mean, one run, a point of the path
WIDE, NARROW, PANEL = (860, 500, 13), (340, 400, 12), (268, 186, 12)  # width, height, text size
LEVELS = {"reference", "undefended"}  # kinds of rows drawn as horizontal lines in the sweep plots
PathPoint = tuple[float, float, str]


@cache
def palette() -> dict[str, str]:
    """Return the light-mode colors of page.css as #rrggbb, by name."""
    css = files("safelora_fast.compare").joinpath("templates/page.css").read_text("utf-8")
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", css[: css.index("}")]))


@dataclass(frozen=True)
class Style:
    """The look of a row's marks: a color name of page.css, and an index into MARKERS and SHAPES."""

    color: str
    shape: int

    @property
    def character(self) -> str:
        """The mark as a character."""
        return SHAPES[self.shape]


def styles(rows: Iterable[Row]) -> list[Style]:
    """Return a style for each row: gray for the reference; after seven rows, colors repeat with other shapes."""
    found: list[Style] = []
    others = 0
    for row in rows:
        if row.kind == "reference":
            found.append(Style("reference", 0))
        else:
            found.append(Style(f"c{others % len(COLORS)}", (others + others // len(COLORS)) % len(MARKERS)))
            others += 1
    return found


@dataclass(frozen=True)
class LearningPlot:
    """Learning against drift: the drawings, and the data for the text around them.

    Attributes:
        wide, narrow: drawing for wide screens, and for narrow ones.
        shown: rows in the plot, with their styles.
        missing: names of the rows left out because they lack a value.
        named: whether the wide drawing shows every name in full.
        path: whether the path of the scaled update is drawn.
        better: direction of good values, such as "down and to the right"; "" if the columns define none.
    """

    wide: str
    narrow: str
    shown: tuple[tuple[Row, Style], ...]
    missing: tuple[str, ...]
    named: bool
    path: bool
    better: str


def learning_plot(report: ComparisonReport, plot: Plot | None, identity: str = "") -> LearningPlot | None:
    """Return the drawings of a plot; None if there is none, or if no row has both values.

    Args:
        report: the report.
        plot: one of its plots.
        identity: tells the drawings of several plots on one page apart.
    """
    columns = {column.key: column for column in report.columns}
    if plot is None or not {plot.x, plot.y} <= columns.keys():
        return None
    x, y = columns[plot.x], columns[plot.y]
    every = zip(report.rows, styles(report.rows), strict=True)
    shown = tuple((row, style) for row, style in every if _has_value(row, x) and _has_value(row, y))
    if not shown:
        return None
    path = list(_path(report, plot, x, y))
    wide, named = _draw_learning(f"{identity}wide", WIDE, shown, path, x, y)
    narrow, _ = _draw_learning(f"{identity}narrow", NARROW, shown, path, x, y)
    rows = [row for row, _ in shown]
    missing = [row.name for row in report.rows if row not in rows and not (path and row.kind == "reference")]
    better = f"{'down' if y.better == 'lower' else 'up'} and to the right" if x.better and y.better else ""
    return LearningPlot(wide, narrow, shown, tuple(missing), named, bool(path), better)


def sweep_plots(report: ComparisonReport) -> Iterator[tuple[str, str]]:
    """Yield a title and a drawing each: the number of projected modules by threshold, then each column."""
    modules = max((point.modules for point in report.sweep), default=0)
    projected = [(point.threshold, point.projected, None) for point in report.sweep if is_value(point.projected)]
    yield _draw_panel(0, f"modules projected, of {modules}", projected, {}, (0.0, float(modules)))
    for number, column in enumerate(sweep_columns(report), 1):
        curve = [
            (point.threshold, _shown(cell.value, column), _interval(cell, column))
            for point in report.sweep
            if (cell := point.cells.get(column.key)) is not None and is_value(cell.value)
        ]
        levels = {
            row.name: _shown(cell.value, column)
            for row in report.rows
            if row.kind in LEVELS and (cell := row.cells.get(column.key)) is not None and is_value(cell.value)
        }
        yield _draw_panel(number, words().heading(column), curve, levels, ())


def _has_value(row: Row, column: Column) -> bool:
    return column.key in row.cells and is_value(row.cells[column.key].value)


def _shown(value: float, column: Column) -> float:
    return 100 * value if column.unit == "%" else value


def _interval(cell: Cell, column: Column) -> tuple[float, float] | None:
    if not (is_value(cell.low) and is_value(cell.high)):
        return None
    return _shown(cell.low, column), _shown(cell.high, column)


def _path(report: ComparisonReport, plot: Plot, x: Column, y: Column) -> Iterator[PathPoint]:
    """Yield the points of the scaled-down undefended update; an unnamed first point gets the reference's name."""
    reference = next((row.name for row in report.rows if row.kind == "reference"), "")
    for index, (across, up, label) in enumerate(plot.path):
        if is_value(across) and is_value(up):
            yield _shown(across, x), _shown(up, y), label or (reference if index == 0 else "")


def _draw_learning(
    identity: str,
    sheet: tuple[int, int, int],
    shown: Sequence[tuple[Row, Style]],
    path: Sequence[PathPoint],
    x: Column,
    y: Column,
) -> tuple[str, bool]:
    """Return the drawing, and whether it shows every name in full."""
    label = f"{y.title} against {x.title}; every value is in the tables"
    with page_drawing(identity, label, palette(), *sheet) as drawn:
        axes, width = drawn.axes, sheet[0] // sheet[2] * 2  # characters are about half as wide as high
        if x.better == "lower":
            axes.invert_xaxis()
        axes.set_xlabel(_axis_title(x, width))
        axes.set_title(_axis_title(y, width))
        if path:
            across, up, _ = zip(*path, strict=True)
            axes.plot(across, up, color=palette()["muted"], linestyle=(0, (4, 3)), linewidth=1.3)
        for step_x, step_y, name in path:
            drawn.mark((step_x, step_y), "o", STEP, "page", "muted", "step", tip=name)
        means: list[tuple[float, float]] = [
            (_shown(row.cells[x.key].value or 0.0, x), _shown(row.cells[y.key].value or 0.0, y)) for row, _ in shown
        ]
        for (row, style), (mean_x, mean_y) in zip(shown, means, strict=True):
            of_x, of_y = row.cells[x.key], row.cells[y.key]
            line = {"color": palette()[f"{style.color}-edge"], "linewidth": 1.2, "alpha": 0.75}
            axes.plot(_interval(of_x, x) or (mean_x, mean_x), (mean_y, mean_y), **line)
            axes.plot((mean_x, mean_x), _interval(of_y, y) or (mean_y, mean_y), **line)
            heights = {run.seed: run.value for run in of_y.seeds if is_value(run.value)}
            for run in of_x.seeds:
                if is_value(run.value) and run.seed in heights:
                    place = _shown(run.value, x), _shown(heights[run.seed], y)
                    _mark(drawn, style, place, RUN, "run", alpha=0.5)
        for (row, style), mean in zip(shown, means, strict=True):
            values = (f"{one.title} {format_quantity(row.cells[one.key].value, one.unit)}" for one in (x, y))
            _mark(drawn, style, mean, MEAN, "mark", tip=f"{row.name}: {', '.join(values)}", zorder=3)
        named = drawn.write_names([(mean, row.name) for (row, _), mean in zip(shown, means, strict=True)], "name")
        steps = [((across, up), name) for across, up, name in path if name]
        drawn.write_names(steps, "step-name", farthest=DISTANCES[1])
    return drawn.markup, named


def _mark(drawn: Any, style: Style, place: tuple[float, float], size: float, kind: str, **options: Any) -> None:
    drawn.mark(place, MARKERS[style.shape], size, style.color, f"{style.color}-edge", kind, **options)


def _axis_title(column: Column, width: int) -> str:
    """Return title, unit and good direction, in at most three lines."""
    unit = f" ({column.unit})" if column.unit else ""
    better = f", {column.better} is better" if column.better else ""
    title = without_controls(f"{column.title}{unit}{better}")
    return textwrap.fill(" ".join(title.split()), width, max_lines=3, placeholder="…")


def _draw_panel(
    number: int,
    title: str,
    curve: Sequence[tuple[float, float, tuple[float, float] | None]],
    levels: dict[str, float],
    extent: Sequence[float],
) -> tuple[str, str]:
    """Draw a column by threshold, with the values of some rows as horizontal lines."""
    label = f"{title} by threshold; every value is in the table"
    with page_drawing(f"sweep-{number}", label, palette(), *PANEL) as drawn:
        axes = drawn.axes
        axes.set_xlabel("τ")
        places = [place for place, _, _ in curve]
        axes.plot(places, [value for _, value, _ in curve], color=palette()["c0-edge"], linewidth=1.5)
        ends = [(place, *interval) for place, _, interval in curve if interval is not None]
        if len(ends) > 1:
            axes.fill_between(*zip(*ends, strict=True), color=palette()["c0"], alpha=0.15, linewidth=0)
        for place, value, _ in curve:
            drawn.mark((place, value), "o", RUN, "c0", "c0-edge", "point")
        axes.update_datalim([(place, value) for place in places[:1] for value in extent])
        axes.autoscale_view()
        for index, (name, value) in enumerate(levels.items()):
            axes.axhline(value, color=palette()["muted"], linestyle=(0, (2, 3)), linewidth=1)
            # Put the name at the end of the line that is farther from the curve.
            at_start = bool(curve) and abs(curve[0][1] - value) > abs(curve[-1][1] - value)
            axes.annotate(
                textwrap.shorten(without_controls(name), 20, placeholder="…"), (0.01 if at_start else 0.99, value),
                xycoords=axes.get_yaxis_transform(), textcoords="offset pixels", xytext=(0, 2), va="bottom",
                ha="left" if at_start else "right", gid=f"level-name:{index}", in_layout=False,
            )  # fmt: skip
    return title, drawn.markup
