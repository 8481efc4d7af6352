"""SafeLoRA by threshold: one small drawing for the number of projected modules and one for each measure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.comparison.figures_text import format_heading, is_figure
from safelora_fast.comparison.origins import sweep_columns
from safelora_fast.comparison.page.axes import Axes, Sheet, text
from safelora_fast.comparison.page.labels import shortened
from safelora_fast.comparison.page.markup import Markup, element, foreign, join, number
from safelora_fast.comparison.page.points import interval, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.comparison.report import Column, ComparisonReport

PANEL = Sheet(268, 186, 42, 12, 4, 4)
LEVELS = {"reference", "undefended"}  # kinds of rows whose figures are drawn as levels
LONGEST = 130.0  # for the name of a level
Curve = list[tuple[float, float, tuple[float, float] | None]]  # threshold, value, interval


def sweep_plot(report: ComparisonReport, caption: str) -> Markup:
    """The panels of the sweep."""
    modules = max((point.modules for point in report.sweep), default=0)
    projected: Curve = [
        (point.threshold, point.projected, None) for point in report.sweep if is_figure(point.projected)
    ]
    panels = [_panel(f"modules projected, of {modules}", projected, [0.0, float(modules)], {})]
    panels += [_measure(report, column) for column in sweep_columns(report)]
    return element("figure", element("div", *panels, class_="panels"), element("figcaption", caption), class_="sweep")


def _measure(report: ComparisonReport, column: Column) -> Markup:
    curve: Curve = []
    for point in report.sweep:
        cell = point.cells.get(column.key)
        if cell is not None and is_figure(cell.value):
            curve.append((point.threshold, shown(cell.value, column), interval(cell, column)))
    levels = {}
    for row in report.rows:
        cell = row.cells.get(column.key)
        if row.kind in LEVELS and cell is not None and is_figure(cell.value):
            levels[row.name] = shown(cell.value, column)
    return _panel(format_heading(column), curve, [], levels)


def _panel(title: str, curve: Curve, extent: Sequence[float], levels: dict[str, float]) -> Markup:
    values = [value for _, value, _ in curve] + [end for _, _, ends in curve for end in ends or ()]
    axes = Axes.around(PANEL, [threshold for threshold, _, _ in curve], [*values, *extent, *levels.values()], ("τ", ""))
    drawing = element(
        "svg",
        axes.draw(),
        _curve(axes, curve),
        join(_level(axes, name, value, curve) for name, value in levels.items()),
        viewBox=f"0 0 {number(PANEL.width)} {number(PANEL.height)}",
        role="img",
        aria_label=f"{title} by threshold; every figure is in the table",
    )
    return element("div", element("p", foreign(title), class_="panel-title"), drawing, class_="panel")


def _level(axes: Axes, name: str, value: float, curve: Curve) -> Markup:
    """A line at what a row of the comparison came to, with its name where the curve is farther away."""
    y, area, font = axes.y.place(value), axes.area, axes.sheet.font
    line = element("line", class_="level", x1=area.left, x2=area.right, y1=y, y2=y)
    height = y + (-0.35 if y - area.top > 2 * font else 1.0) * font
    at_start = bool(curve) and abs(curve[0][1] - value) > abs(curve[-1][1] - value)
    x, anchor = (area.left + 4, "start") if at_start else (area.right, "end")
    return join([line, text(shortened(name, LONGEST, font), x, height, anchor, "level-name")])


def _curve(axes: Axes, curve: Curve) -> Markup:
    places = [axes.at(threshold, value) for threshold, value, _ in curve]
    ends = [(axes.x.place(threshold), *map(axes.y.place, both)) for threshold, _, both in curve if both]
    band = [(x, high) for x, _, high in ends] + [(x, low) for x, low, _ in reversed(ends)]
    return join([
        element("polygon", class_="band", points=_corners(band)) if len(ends) > 1 else Markup(),
        element("polyline", class_="curve", points=_corners(places)),
        *(element("circle", class_="mark c0", cx=x, cy=y, r=3.2) for x, y in places),
    ])  # fmt: skip


def _corners(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{number(x)},{number(y)}" for x, y in places)
