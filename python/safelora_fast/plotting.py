"""Plots by matplotlib: files that are written atomically, and SVG drawings in the colors of an HTML page."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from safelora_fast.errors import MissingDependencyError, OutputError, how_to_install
from safelora_fast.files.output import described, resolved
from safelora_fast.printable import without_controls

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

Point = tuple[float, float]

SUFFIXES = {".png", ".svg", ".pdf"}
# Okabe and Ito's colors, which people with any color vision can distinguish, each with a marker for print. After seven
# styles, the colors repeat with other markers.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = [(color, MARKERS[(index + turn) % 7]) for turn in range(7) for index, color in enumerate(COLORS)]
GRAY = "0.3"

LONGEST_NAME = 30  # characters
SMALL_MARK = 6.0  # pixels; a name may cover marks up to this diameter
# Positions of a name, nearest first: distances from its mark in pixels; directions right, left, above, below, diagonal.
DISTANCES = (8.0, 14.0, 24.0, 38.0)
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))
COVER_PENALTY = 3.0  # pixels of distance; the cost of covering one small mark
LEADER_DISTANCE = 14.0  # pixels; a name farther from its mark gets a leader line


def check_plot(path: Path) -> None:
    """Raise an error if a plot cannot be written. Call this before the work starts.

    Raises:
        MissingDependencyError: matplotlib is missing.
        OutputError: the suffix is unknown or the folder is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise MissingDependencyError(f"a plot needs matplotlib: {how_to_install('plot')}") from None
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"{path}: a plot is one of {', '.join(sorted(SUFFIXES))}, not {path.suffix!r}")
    with described(path):
        if not resolved(path).parent.is_dir():
            raise OutputError(f"{path}: the folder {resolved(path).parent} does not exist")


def new_figure(width: float, height: float, dpi: float = 100) -> Figure:
    """Return a figure of `width` × `height` inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def plot_file(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Yield a figure, and write it atomically when the block ends. The same plot gives the same bytes.

    Raises:
        MissingDependencyError: see :func:`check_plot`.
        OutputError: see :func:`check_plot`; or the file cannot be written.
    """
    check_plot(path)
    figure = new_figure(width, height)
    yield figure
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    without_date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    with described(path):
        try:
            figure.savefig(partial, dpi=150, metadata=without_date)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def mark_line(axes: Any, value: float, text: str, *, vertical: bool = False, color: str = GRAY) -> None:
    """Draw a dashed line across the axes and label it: a vertical one at its top, a horizontal one at its right end."""
    if vertical:
        axes.axvline(value, color=color, linestyle="--", linewidth=1)
        end, transform, align = (value, 0.98), axes.get_xaxis_transform(), "top"
    else:
        axes.axhline(value, color=color, linestyle="--", linewidth=1)
        end, transform, align = (1.0, value), axes.get_yaxis_transform(), "center"
    axes.annotate(text, end, (4, 0), transform, "offset points", va=align, fontsize=9, color=color)


@contextmanager
def page_drawing(
    identity: str, label: str, colors: dict[str, str], width: int, height: int, font: int
) -> Iterator[Drawing]:
    """Yield a drawing for an HTML page. After the block, `markup` has the SVG. The same drawing gives the same bytes.

    Args:
        identity: an id that is unique on the page.
        label: a description of the drawing for screen readers.
        colors: `#rrggbb` by the name of the CSS variable that replaces it; "ink", "muted" and "rule" are required.
        width: in pixels.
        height: in pixels.
        font: text size in pixels.
    """
    from matplotlib import style

    ink, muted = colors["ink"], colors["muted"]
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": identity, "text.parse_math": False, "text.color": ink,
        "font.size": font, "axes.titlesize": font, "axes.titlelocation": "left", "axes.titleweight": "bold",
        "axes.labelsize": font, "axes.labelcolor": ink, "axes.labelweight": "bold", "xaxis.labellocation": "right",
        "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "axes.edgecolor": ink,
        "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": colors["rule"],
        "xtick.color": ink, "xtick.labelcolor": muted, "ytick.labelcolor": muted, "ytick.major.size": 0,
        "axes.xmargin": 0.06, "axes.ymargin": 0.06,
    }  # fmt: skip
    with style.context(["default", settings], after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has other fonts
        drawing = Drawing(colors, width, height, font)
        yield drawing
        drawing.finish(label)


class Drawing:
    """One pair of axes with marks and names. :func:`page_drawing` creates it.

    Attributes:
        axes: the matplotlib axes.
        markup: the SVG, once the drawing is finished.
    """

    def __init__(self, colors: dict[str, str], width: int, height: int, font: int) -> None:
        from matplotlib.ticker import MaxNLocator

        self.colors = colors
        self.markup = ""
        self._figure = new_figure(width / 72, height / 72, dpi=72)
        self.axes: Any = self._figure.add_subplot()
        for axis, length in ((self.axes.xaxis, width), (self.axes.yaxis, height)):
            axis.set_major_locator(MaxNLocator(nbins=max(4, length // (7 * font)), min_n_ticks=2, steps=[1, 2, 5, 10]))
        self._small: list[Any] = []
        self._large: list[Any] = []
        self._names: list[Bbox] = []
        self._tips: dict[str, str] = {}

    def mark(
        self, point: Point, marker: str, size: float, fill: str, edge: str, kind: str, *, tip: str = "", **options: Any
    ) -> None:
        """Draw a mark.

        Args:
            point: the position in data coordinates.
            marker: a matplotlib marker.
            size: diameter in pixels.
            fill: name of the fill color.
            edge: name of the edge color.
            kind: CSS class on the page.
            tip: text shown when the pointer rests on the mark.
            options: matplotlib options for the mark.
        """
        identity = f"{kind}:{len(self._tips)}"
        self._tips[identity] = without_controls(tip)
        colors: dict[str, Any] = {"markerfacecolor": self.colors[fill], "markeredgecolor": self.colors[edge]}
        marks = self.axes.plot(*([one] for one in point), marker, markersize=size, gid=identity, **colors, **options)
        (self._small if size <= SMALL_MARK else self._large).extend(marks)

    def write_names(self, names: Sequence[tuple[Point, str]], kind: str, *, farthest: float = DISTANCES[-1]) -> bool:
        """Write names next to their marks where there is room, in the given order. Return whether all are shown fully.

        No name covers another name or a large mark.
        """
        self._figure.draw_without_rendering()
        return all([self._write_name(point, name, kind, farthest) for point, name in names])  # noqa: C419 - write all

    def _write_name(self, point: Point, name: str, kind: str, farthest: float) -> bool:
        name = " ".join(without_controls(name).split())
        text = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1].rstrip()}…"
        found = self._find_room(text, point, farthest)
        if found is None:
            return False
        distance, box = found
        self._names.append(box)
        x, y = self.axes.transData.transform(point)
        leader = {"arrowstyle": "-", "color": self.colors["muted"], "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate(
            text, point, (box.x0 - x, box.y0 - y), textcoords="offset pixels", va="bottom", in_layout=False,
            gid=f"{kind}:{len(self._names)}", arrowprops=leader if distance > LEADER_DISTANCE else None,
        )  # fmt: skip
        return text == name

    def _find_room(self, text: str, point: Point, farthest: float) -> tuple[float, Bbox] | None:
        """Return distance and box of the best free place for a name; None if there is no room."""
        from matplotlib.transforms import Bbox

        sample = self._figure.text(0, 0, text)
        size = sample.get_window_extent()
        sample.remove()
        inside = self.axes.get_window_extent()
        taken = [mark.get_window_extent() for mark in self._large] + self._names
        small = [mark.get_window_extent() for mark in self._small]
        x, y = self.axes.transData.transform(point)
        candidates = []
        for distance in (one for one in DISTANCES if one <= farthest):
            for right, up in DIRECTIONS:
                left = x + right * distance - {1: 0.0, 0: 0.5, -1: 1.0}[(right > 0) - (right < 0)] * size.width
                foot = y + up * distance - {1: 0.0, 0: 0.5, -1: 1.0}[(up > 0) - (up < 0)] * size.height
                box = Bbox.from_bounds(left, foot, size.width, size.height)
                is_inside = inside.x0 <= left and box.x1 <= inside.x1 and inside.y0 <= foot and box.y1 <= inside.y1
                if is_inside and not box.count_overlaps(taken):
                    candidates.append((distance + COVER_PENALTY * box.count_overlaps(small), distance, box))
        return min(candidates, key=lambda one: one[0])[1:] if candidates else None

    def finish(self, label: str) -> None:
        """Make the SVG. Ticks below zero are removed if all values are zero or more."""
        for axis in (self.axes.xaxis, self.axes.yaxis):
            if axis.get_data_interval()[0] >= 0:
                ends = sorted(axis.get_view_interval())
                axis.set_ticks([tick for tick in axis.get_ticklocs() if max(ends[0], 0) <= tick <= ends[1]])
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self._figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
        root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 - made by matplotlib a moment ago
        self._keep_what_a_page_needs(root)
        root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": without_controls(label)}
        self.markup = ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)

    def _keep_what_a_page_needs(self, root: ElementTree.Element) -> None:
        """Drop namespaces, metadata and unused ids. Ids like `class:number` become classes, and colors variables."""
        names = {value: name for name, value in reversed(self.colors.items())}
        used = set(re.findall(r"[(\"]#([\w-]+)", ElementTree.tostring(root, encoding="unicode")))
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
                if self._tips.get(identity):
                    tip = ElementTree.Element("title")
                    tip.text = self._tips[identity]
                    part.insert(0, tip)
            elif identity in used:
                part.set("id", identity)
            if "style" in part.attrib:
                style = re.sub(r"font-family: [^;]*;? ?", "", part.attrib["style"])
                part.set("style", re.sub(r"#[0-9a-f]{6}", lambda hit: _variable(hit[0], names), style))


def _variable(color: str, names: Mapping[str, str]) -> str:
    return f"var(--{names[color]})" if color in names else color
