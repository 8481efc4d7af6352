"""A shape and a colour for every row, the same in its table and in the plot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_fast.comparison.page.markup import element, number

if TYPE_CHECKING:
    from collections.abc import Iterable

    from safelora_fast.comparison.page.markup import Markup
    from safelora_fast.comparison.report import Row

COLOURS = 7  # of Okabe and Ito, told apart with any colour vision; `page.css` has them as c0 to c6


def _polygon(corners: int, turn: float, reach: float) -> list[tuple[float, float]]:
    angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
    return [(reach * math.sin(angle), -reach * math.cos(angle)) for angle in angles]


def _cross(turn: float) -> list[tuple[float, float]]:
    arm, reach = 0.36, 1.15
    corners = [(-arm, -reach), (arm, -reach), (arm, -arm), (reach, -arm), (reach, arm), (arm, arm)]
    corners += [(-x, -y) for x, y in corners]
    sine, cosine = math.sin(turn), math.cos(turn)
    return [(x * cosine - y * sine, x * sine + y * cosine) for x, y in corners]


# Corners for a radius of 1, of about the same area; a circle has none.
SHAPES: tuple[list[tuple[float, float]], ...] = (
    [],
    _polygon(4, math.pi / 4, 1.25),
    _polygon(3, 0.0, 1.4),
    _polygon(4, 0.0, 1.3),
    _polygon(3, math.pi, 1.4),
    _cross(0.0),
    _cross(math.pi / 4),
)


@dataclass(frozen=True)
class Style:
    """How the marks of a row look.

    Attributes:
        colour: a class of the style sheet.
        shape: index of :data:`SHAPES`.
    """

    colour: str
    shape: int


def styles(rows: Iterable[Row]) -> list[Style]:
    """A style for each row: grey for the reference; beyond seven the colours come again with other shapes."""
    found, count = [], 0
    for row in rows:
        if row.kind == "reference":
            found.append(Style("reference", 0))
        else:
            found.append(Style(f"c{count % COLOURS}", (count + count // COLOURS) % len(SHAPES)))
            count += 1
    return found


def mark(style: Style, x: float, y: float, radius: float, *, run: bool = False, title: str | None = None) -> Markup:
    """A mark at a place; that of a single run is fainter."""
    class_ = f"mark {style.colour}" + (" run" if run else "")
    tip = element("title", title) if title else None
    corners = SHAPES[style.shape]
    if not corners:
        return element("circle", tip, class_=class_, cx=x, cy=y, r=radius)
    points = " ".join(f"{number(x + radius * right)},{number(y + radius * down)}" for right, down in corners)
    return element("polygon", tip, class_=class_, points=points)


def key(style: Style) -> Markup:
    """The mark beside a name."""
    return element("svg", mark(style, 0.0, 0.0, 5.0), class_="key", viewBox="-8 -8 16 16", aria_hidden="true")
