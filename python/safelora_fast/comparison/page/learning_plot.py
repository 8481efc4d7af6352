"""What each defence lets a model learn against how far it drifts, drawn twice: for wide and for narrow screens."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from safelora_fast.comparison.figures_text import is_figure
from safelora_fast.comparison.page.axes import Axes, Sheet, axis_title, text
from safelora_fast.comparison.page.labels import Box, Labels, shortened
from safelora_fast.comparison.page.marks import key, mark
from safelora_fast.comparison.page.markup import Markup, element, foreign, join, number
from safelora_fast.comparison.page.points import points, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from safelora_fast.comparison.page.points import Point
    from safelora_fast.comparison.report import Column, ComparisonReport

MEAN, RUN, STEP = 6.0, 2.6, 3.0  # radii of a row's mean, of one run, and of a point of the path
WIDE, NARROW = Sheet(860, 500, 52, 13, 8, 6), Sheet(340, 400, 40, 12, 4, 5)
LONGEST = 0.36  # of a sheet's width, for a name
FAR = 20.0  # from its mark, a name gets a line that leads to it


def learning_plot(report: ComparisonReport, caption: str) -> Markup | None:
    """The figure; None where the report has no plot, or no row with both measures."""
    columns = {column.key: column for column in report.columns}
    if report.plot is None or not {report.plot.x, report.plot.y} <= columns.keys():
        return None
    x, y = columns[report.plot.x], columns[report.plot.y]
    drawn = list(points(report, x, y))
    if not drawn:
        return None
    path = list(_steps(report, x, y))
    (wide, named), (narrow, _) = (_drawing(sheet, drawn, path, x, y) for sheet in (WIDE, NARROW))
    absent = (row for row in report.rows if all(row is not point.row for point in drawn))
    missing = [row.name for row in absent if not (path and row.kind == "reference")]
    words = element("figcaption", caption, *_explanation(x, y, path=bool(path)), *_missing(missing))
    return element(
        "figure",
        element("div", wide, class_="for-wide"),
        element("div", narrow, class_="for-narrow"),
        _legend(drawn, "legend for-narrow" if named else "legend"),
        words,
        class_="learning",
    )


def _steps(report: ComparisonReport, x: Column, y: Column) -> Iterator[tuple[float, float, str]]:
    """The path as the axes show it; the step that is none of the update, if it has no name, has the reference's."""
    reference = next((row.name for row in report.rows if row.kind == "reference"), "")
    for place, (across, up, label) in enumerate(report.plot.path if report.plot else ()):
        if is_figure(across) and is_figure(up):
            yield shown(across, x), shown(up, y), label or (reference if place == 0 else "")


def _drawing(
    sheet: Sheet, drawn: Sequence[Point], path: Sequence[tuple[float, float, str]], x: Column, y: Column
) -> tuple[Markup, bool]:
    """The drawing, and whether it has every name in full."""
    xs = [each for point in drawn for each in (*point.across, *(run[0] for run in point.runs))]
    ys = [each for point in drawn for each in (*point.up, *(run[1] for run in point.runs))]
    axes = Axes.around(
        sheet,
        [*xs, *(step[0] for step in path)],
        [*ys, *(step[1] for step in path)],
        (axis_title(x), axis_title(y)),
        leftwards=x.better == "lower",
    )
    labels, named = _names(axes, drawn, path)
    drawing = element(
        "svg",
        axes.draw(),
        _path(axes, path),
        join(_uncertainty(axes, point) for point in drawn),
        join(mark(point.style, *axes.at(point.x, point.y), MEAN, title=point.tip) for point in drawn),
        labels,
        viewBox=f"0 0 {number(sheet.width)} {number(sheet.height)}",
        role="img",
        aria_label=f"{y.title} against {x.title}; every figure is in the tables",
    )
    return drawing, named


def _path(axes: Axes, path: Sequence[tuple[float, float, str]]) -> Markup:
    """The undefended update as it is scaled down."""
    places = [axes.at(across, up) for across, up, _ in path]
    line = element("polyline", class_="path", points=" ".join(f"{number(x)},{number(y)}" for x, y in places))
    steps = (
        element("circle", element("title", step[2]), class_="step", cx=x, cy=y, r=STEP)
        for (x, y), step in zip(places, path, strict=True)
    )
    return join([line, *steps]) if places else Markup()


def _uncertainty(axes: Axes, point: Point) -> Markup:
    """Whiskers, and the runs one by one."""
    x, y = axes.at(point.x, point.y)
    (left, right), (low, high) = map(axes.x.place, point.across), map(axes.y.place, point.up)
    class_ = f"whisker {point.style.colour}"
    return join([
        element("line", class_=class_, x1=left, x2=right, y1=y, y2=y),
        element("line", class_=class_, x1=x, x2=x, y1=low, y2=high),
        *(mark(point.style, *axes.at(*run), RUN, run=True) for run in point.runs),
    ])  # fmt: skip


def _names(axes: Axes, drawn: Sequence[Point], path: Sequence[tuple[float, float, str]]) -> tuple[Markup, bool]:
    """Every name for which there is room, then the path's; and whether every row has its name in full."""
    means = [axes.at(point.x, point.y) for point in drawn]
    steps = [axes.at(across, up) for across, up, _ in path]
    lines = [Box.around(*step, STEP) for step in steps] + [Box.around(*place, 1) for place in _along(steps)]
    for point, (x, y) in zip(drawn, means, strict=True):
        across = [(axes.x.place(end), y) for end in point.across]
        up = [(x, axes.y.place(end)) for end in point.up]
        lines += [Box.around(*place, 1) for whisker in (across, up) for place in _along(whisker)]
        lines += [Box.around(*axes.at(*run), RUN) for run in point.runs]
    font, longest = axes.sheet.font, LONGEST * axes.sheet.width
    labels = Labels(axes.area, [Box.around(*mean, MEAN + 1) for mean in means], lines, font)
    parts, named = [], True
    for point, (x, y) in zip(drawn, means, strict=True):
        name = shortened(point.row.name, longest, font)
        label = labels.put(name, x, y)
        named = named and label is not None and name == point.row.name
        if label is not None:
            if label.distance > FAR:
                ends = min(max(x, label.box.left), label.box.right), min(max(y, label.box.top), label.box.bottom)
                parts.append(element("line", class_="leader", x1=x, y1=y, x2=ends[0], y2=ends[1]))
            parts.append(text(label.text, label.x, label.y, "start", "name"))
    for (x, y), (_, _, words) in zip(steps, path, strict=True):
        if words and not any(Box.around(x, y, STEP).overlaps(Box.around(*mean, MEAN)) for mean in means):
            label = labels.put(shortened(words, longest, font), x, y, farthest=FAR)
            if label is not None:
                parts.append(text(label.text, label.x, label.y, "start", "step-name"))
    return join(parts), named


def _along(places: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Points on a line, close enough for no name to lie between two."""
    for (left, low), (right, high) in itertools.pairwise(places):
        count = math.ceil(math.hypot(right - left, high - low) / 8)
        for part in range(1, count):
            share = part / count
            yield left + share * (right - left), low + share * (high - low)


def _legend(drawn: Sequence[Point], class_: str) -> Markup:
    items = (
        element("li", key(point.style), foreign(point.row.name), " ", element("span", foreign(point.row.setting), class_="setting"))
        for point in drawn
    )  # fmt: skip
    return element("ul", *items, class_=class_)


def _explanation(x: Column, y: Column, *, path: bool) -> list[str]:
    words = [" Large marks are means over the runs, small ones the runs, lines 95 % intervals."]
    if path:
        words.append(" Dashed: the undefended update scaled down, from all of it to none.")
    if x.better and y.better:
        words.append(f" Further {'down' if y.better == 'lower' else 'up'} and to the right is better.")
    return words


def _missing(names: Sequence[str]) -> list[str]:
    return [" Not shown, for want of a figure: ", join(map(foreign, names), ", "), "."] if names else []
