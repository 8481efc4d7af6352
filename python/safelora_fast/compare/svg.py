"""Drawings by matplotlib as SVG in an HTML page, colored by the names of the page's style sheet: they follow light and dark."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from safelora_fast.compare.number_text import one_line, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.transforms import Bbox

Place = tuple[float, float]

LONGEST = 30  # characters of a name
SMALL = 6.0  # a name may cover marks up to this diameter if need be
# Where a name may stand, nearest first: distances from its mark in pixels; then right, left, above, below, and between.
DISTANCES = (8.0, 14.0, 24.0, 38.0)
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))
CROSSING = 3.0  # covering a small mark is as bad as this much more distance
FAR = 14.0  # from its mark, a name gets a line that leads to it


@cache
def palette() -> dict[str, str]:
    """The colors of page.css on a light screen, as #rrggbb, by name."""
    css = files("safelora_fast.compare").joinpath("templates/page.css").read_text("utf-8")
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", css[: css.index("}")]))


@contextmanager
def drawing(identity: str, label: str, width: int, height: int, font: int) -> Iterator[Drawing]:
    """Axes to draw in; once the block ends, `markup` has the SVG.

    Args:
        identity: unique on the page.
        label: what it shows, for those who do not see it.
        width: of the drawing in pixels.
        height: of the drawing in pixels.
        font: size of its text.
    """
    from matplotlib import style

    ink, muted = palette()["ink"], palette()["muted"]
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": identity, "text.parse_math": False, "text.color": ink,
        "font.size": font, "axes.titlesize": font, "axes.titlelocation": "left", "axes.titleweight": "bold",
        "axes.labelsize": font, "axes.labelcolor": ink, "axes.labelweight": "bold", "xaxis.labellocation": "right",
        "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "axes.edgecolor": ink,
        "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": palette()["rule"],
        "xtick.color": ink, "xtick.labelcolor": muted, "ytick.labelcolor": muted, "ytick.major.size": 0,
        "axes.xmargin": 0.06, "axes.ymargin": 0.06,
    }  # fmt: skip
    with style.context(["default", settings], after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has other fonts
        drawn = Drawing(width, height, font)
        yield drawn
        drawn.finish(label)


class Drawing:
    """One pair of axes and what stands on it; see :func:`drawing`.

    Attributes:
        axes: of matplotlib.
        markup: the SVG, once it is finished.
    """

    def __init__(self, width: int, height: int, font: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        self._figure = Figure((width / 72, height / 72), dpi=72, layout="constrained")
        FigureCanvasAgg(self._figure)
        self.axes = self._figure.add_subplot()
        self.markup = ""
        for axis, length in ((self.axes.xaxis, width), (self.axes.yaxis, height)):
            axis.set_major_locator(MaxNLocator(nbins=max(4, length // (7 * font)), min_n_ticks=2, steps=[1, 2, 5, 10]))
        self._small: list[Any] = []
        self._large: list[Any] = []
        self._names: list[Bbox] = []
        self._tips: dict[str, str] = {}

    def mark(self, place: Place, marker: str, size: float, fill: str, edge: str, kind: str, **options: Any) -> None:
        """Draw a mark.

        Args:
            place: in the values of the axes.
            marker: of matplotlib.
            size: its diameter in pixels.
            fill: name of a color.
            edge: name of a color.
            kind: its class on the page.
            options: `tip`, what is told of it; the others are matplotlib's.
        """
        identity = f"{kind}:{len(self._tips)}"
        self._tips[identity] = options.pop("tip", "")
        colors: dict[str, Any] = {"markerfacecolor": palette()[fill], "markeredgecolor": palette()[edge]}
        marks = self.axes.plot(*([one] for one in place), marker, markersize=size, gid=identity, **colors, **options)
        (self._small if size <= SMALL else self._large).extend(marks)

    def write_names(self, names: Sequence[tuple[Place, str]], kind: str, *, farthest: float = DISTANCES[-1]) -> bool:
        """Write names beside their marks where there is room, the first ones first; whether all stand there in full.

        No name covers another, or a large mark.
        """
        self._figure.draw_without_rendering()
        written = [self._write(place, name, kind, farthest) for place, name in names]
        return all(written)

    def _write(self, place: Place, name: str, kind: str, farthest: float) -> bool:
        line = one_line(name)
        text = line if len(line) <= LONGEST else f"{line[: LONGEST - 1].rstrip()}…"
        found = self._room(text, place, farthest)
        if found is None:
            return False
        distance, box = found
        self._names.append(box)
        x, y = self.axes.transData.transform(place)
        leader = {"arrowstyle": "-", "color": palette()["muted"], "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate(
            text, place, (box.x0 - x, box.y0 - y), textcoords="offset pixels", va="bottom", in_layout=False,
            gid=f"{kind}:{len(self._names)}", arrowprops=leader if distance > FAR else None,
        )  # fmt: skip
        return text == line

    def _room(self, text: str, place: Place, farthest: float) -> tuple[float, Bbox] | None:
        """The distance and the box of the best free place for a text."""
        from matplotlib.transforms import Bbox

        sample = self._figure.text(0, 0, text)
        size = sample.get_window_extent()
        sample.remove()
        inside = self.axes.get_window_extent()
        taken = [mark.get_window_extent() for mark in self._large] + self._names
        crossed = [mark.get_window_extent() for mark in self._small]
        x, y = self.axes.transData.transform(place)
        best: tuple[float, float, Bbox] | None = None
        for distance in (one for one in DISTANCES if one <= farthest):
            for right, up in DIRECTIONS:
                left = x + right * distance - {1: 0.0, 0: 0.5, -1: 1.0}[(right > 0) - (right < 0)] * size.width
                foot = y + up * distance - {1: 0.0, 0: 0.5, -1: 1.0}[(up > 0) - (up < 0)] * size.height
                box = Bbox.from_bounds(left, foot, size.width, size.height)
                if any(box.overlaps(other) for other in taken) or not _is_inside(box, inside):
                    continue
                badness = distance + CROSSING * sum(box.overlaps(other) for other in crossed)
                if best is None or badness < best[0]:
                    best = badness, distance, box
        return None if best is None else best[1:]

    def finish(self, label: str) -> None:
        """Make the SVG: no tick below zero where no value is, colors by name, and only what a page needs."""
        for axis in (self.axes.xaxis, self.axes.yaxis):
            if axis.get_data_interval()[0] >= 0:
                ends = sorted(axis.get_view_interval())
                axis.set_ticks([tick for tick in axis.get_ticklocs() if max(ends[0], 0) <= tick <= ends[1]])
        buffer = io.StringIO()
        self._figure.savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), transparent=True
        )
        root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 - made by matplotlib a moment ago
        _clean(root, self._tips)
        root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": printable(label)}
        self.markup = ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _is_inside(box: Bbox, other: Bbox) -> bool:
    return bool(other.x0 <= box.x0 and box.x1 <= other.x1 and other.y0 <= box.y0 and box.y1 <= other.y1)


def _clean(root: ElementTree.Element, tips: dict[str, str]) -> None:
    """Keep what a page needs: no namespaces, metadata or unused identities; those like `class:number` become classes, with tips."""
    names = {value: name for name, value in reversed(palette().items())}
    xml = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r"[(\"]#([\w-]+)", xml))
    for parent in root.iter():
        for child in [child for child in parent if child.tag.rpartition("}")[2] in {"metadata", "style"}]:
            parent.remove(child)
    for part in root.iter():
        part.tag = part.tag.rpartition("}")[2]
        part.attrib = {name.rpartition("}")[2]: value for name, value in part.attrib.items()}
        part.tail = None
        if part.tag not in {"text", "title"}:
            part.text = None
        identity = part.attrib.pop("id", "")
        kind, colon, _ = identity.partition(":")
        if colon:
            part.set("class", kind)
            if tips.get(identity):
                tip = ElementTree.Element("title")
                tip.text = printable(tips[identity])
                part.insert(0, tip)
        elif identity in used:
            part.set("id", identity)
        if "style" in part.attrib:
            style = re.sub(r"font-family: [^;]*;? ?", "", part.attrib["style"])
            part.set(
                "style",
                re.sub(
                    r"#[0-9a-f]{6}", lambda found: f"var(--{names[found[0]]})" if found[0] in names else found[0], style
                ),
            )
