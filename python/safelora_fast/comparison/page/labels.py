"""Where names stand in a plot: beside their marks, and never on another name or mark."""

from __future__ import annotations

import itertools
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NARROW, CAPITAL, USUAL, FULL = 0.4, 0.76, 0.62, 1.05  # of the font size; wide fonts are meant, so that others fit too
# Nearest first: distance of a label from its mark, then to the right, left, above and below.
DISTANCES = (10.0, 18.0, 30.0, 44.0, 56.0)
DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (0.7, -0.7), (-0.7, -0.7), (0.7, 0.7), (-0.7, 0.7))
CROSSING = 3.0  # a run's mark, or a few points of a line, under a name is as bad as this distance
WORST = 60.0  # a name that would be farther away or cross more is left out


@dataclass(frozen=True)
class Box:
    """A part of the picture; `top` is less than `bottom`."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def around(cls, x: float, y: float, radius: float) -> Box:
        """A square about a point."""
        return cls(x - radius, y - radius, x + radius, y + radius)

    def overlaps(self, other: Box) -> bool:
        """Whether they share more than an edge."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def within(self, other: Box) -> bool:
        """Whether nothing of it is outside the other."""
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.top <= self.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True)
class Label:
    """A text in its place.

    Attributes:
        text: what is written.
        x, y: of the start of its baseline.
        box: what it takes up.
        distance: from the mark.
    """

    text: str
    x: float
    y: float
    box: Box
    distance: float


def text_width(text: str, size: float) -> float:
    """About how wide a line of text is; rather too wide than too narrow."""
    return size * sum(map(_character_width, text))


def shortened(text: str, width: float, size: float) -> str:
    """The text, cut to a width."""
    if text_width(text, size) <= width:
        return text
    widths = itertools.accumulate(map(_character_width, text), initial=USUAL + 0.4)
    fitting = sum(1 for each in widths if size * each <= width) - 1
    return text[: max(fitting, 1)].rstrip() + "…"


def wrapped(text: str, width: float, size: float, lines: int) -> list[str]:
    """The words in at most that many lines of a width; what does not fit is cut."""
    result = [""]
    for word in text.split():
        longer = f"{result[-1]} {word}".strip()
        if text_width(longer, size) <= width or not result[-1]:
            result[-1] = longer
        else:
            result.append(word)
    if len(result) > lines:
        result[lines - 1 :] = [" ".join(result[lines - 1 :])]
    return [shortened(line, width, size) for line in result]


class Labels:
    """Places labels one after the other.

    Args:
        area: they must stay inside it.
        marks: they must not touch these.
        lines: they should not touch these.
        size: of the font.
    """

    def __init__(self, area: Box, marks: Iterable[Box], lines: Sequence[Box], size: float) -> None:
        self.area = area
        self.taken = list(marks)
        self.lines = lines
        self.size = size

    def put(self, text: str, x: float, y: float, *, farthest: float = DISTANCES[-1]) -> Label | None:
        """The best free place beside a point, which is taken from then on; None where there is no good one."""
        candidates = (
            self._label(text, x, y, across, down, distance)
            for distance in DISTANCES
            if distance <= farthest
            for across, down in DIRECTIONS
        )
        free = [
            label
            for label in candidates
            if label.box.within(self.area) and not any(label.box.overlaps(other) for other in self.taken)
        ]
        best = min(free, key=self._badness, default=None)
        if best is None or self._badness(best) > WORST:
            return None
        self.taken.append(best.box)
        return best

    def _badness(self, label: Label) -> float:
        return label.distance + CROSSING * sum(label.box.overlaps(line) for line in self.lines)

    def _label(self, text: str, x: float, y: float, across: float, down: float, distance: float) -> Label:
        width, height = text_width(text, self.size), 1.25 * self.size
        left = x + across * distance - {1: 0.0, 0: width / 2, -1: width}[(across > 0) - (across < 0)]
        top = y + down * distance - {1: 0.0, 0: height / 2, -1: height}[(down > 0) - (down < 0)]
        box = Box(left, top, left + width, top + height)
        return Label(text, left, top + 0.94 * self.size, box, distance)


def _character_width(character: str) -> float:
    if unicodedata.combining(character) or unicodedata.category(character) == "Cf":
        return 0.0
    if unicodedata.east_asian_width(character) in "WF" or character in "mwMW%@—":
        return FULL
    if character in "iljItfr.,:;'|!()[]- ":
        return NARROW
    return CAPITAL if character.isupper() else USUAL
