"""The frame of a plot: its area, its two axes with ticks and titles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_fast.comparison.figures_text import format_direction
from safelora_fast.comparison.page.labels import Box, wrapped
from safelora_fast.comparison.page.markup import Markup, element, join
from safelora_fast.comparison.page.scale import Scale

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from safelora_fast.comparison.report import Column

LINES = 3  # of an axis title


@dataclass(frozen=True)
class Sheet:
    """A size to draw at.

    Attributes:
        width, height: of the drawing.
        left: where the vertical axis stands.
        font: size of the text.
        across, up: about how many ticks.
    """

    width: float
    height: float
    left: float
    font: float
    across: int
    up: int


@dataclass(frozen=True)
class Axes:
    """Where values stand on a sheet."""

    sheet: Sheet
    area: Box
    x: Scale
    y: Scale
    titles: tuple[Sequence[str], Sequence[str]]

    @classmethod
    def around(
        cls, sheet: Sheet, xs: Iterable[float], ys: Iterable[float], titles: tuple[str, str], *, leftwards: bool = False
    ) -> Axes:
        """Axes that hold all values, the horizontal one rising to the left if that is the good direction."""
        line = 1.35 * sheet.font
        x_title, y_title = (wrapped(title, sheet.width - 4, sheet.font, LINES) if title else [] for title in titles)
        top = line * len(y_title) + 0.7 * sheet.font
        bottom = sheet.height - line * len(x_title) - 1.8 * sheet.font
        area = Box(sheet.left, top, sheet.width - 0.9 * sheet.font, bottom)
        ends = (area.right, area.left) if leftwards else (area.left, area.right)
        x = Scale.over(xs, *ends, ticks=sheet.across)
        return cls(sheet, area, x, Scale.over(ys, area.bottom, area.top, ticks=sheet.up), (x_title, y_title))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place of a pair of values."""
        return self.x.place(x), self.y.place(y)

    def draw(self) -> Markup:
        """Grid, ticks and titles."""
        area, font = self.area, self.sheet.font
        parts: list[Markup] = []
        for tick in self.y.ticks:
            y = self.y.place(tick)
            parts.append(element("line", class_="grid", x1=area.left, x2=area.right, y1=y, y2=y))
            parts.append(text(self.y.text(tick), area.left - 0.6 * font, y + 0.35 * font, "end", "tick"))
        parts.append(element("line", class_="axis", x1=area.left, x2=area.right, y1=area.bottom, y2=area.bottom))
        for tick in self.x.ticks:
            x = self.x.place(tick)
            parts.append(element("line", class_="axis", x1=x, x2=x, y1=area.bottom, y2=area.bottom + 0.35 * font))
            parts.append(text(self.x.text(tick), x, area.bottom + 1.5 * font, "middle", "tick"))
        x_title, y_title = self.titles
        for number, line in enumerate(y_title):
            parts.append(text(line, 0.0, (1.0 + 1.35 * number) * font, "start", "title"))
        for number, line in enumerate(reversed(x_title)):
            parts.append(text(line, area.right, self.sheet.height - (0.4 + 1.35 * number) * font, "end", "title"))
        return join(parts)


def axis_title(column: Column) -> str:
    """Title, unit and the good direction in words."""
    unit = f" ({column.unit})" if column.unit else ""
    return f"{column.title}{unit}" + (f", {format_direction(column)}" if column.better else "")


def text(words: str, x: float, y: float, anchor: str, class_: str) -> Markup:
    """A line of text in a drawing."""
    return element("text", words, class_=class_, x=x, y=y, text_anchor=anchor)
