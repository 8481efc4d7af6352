"""A picture of cosine and gain by depth, with the threshold drawn in."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.module_names import block_of, is_after_the_blocks, kinds
from safelora_fast.errors import MissingDependencyError, OutputError, how_to_install
from safelora_fast.files.output import described, resolved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from safelora_fast.projection.report import AdapterReport, ModuleReport, ProjectionReport

SUFFIXES = {".png", ".svg", ".pdf"}
# Okabe and Ito's colours, which people with any colour vision can tell apart, and a marker each for print. Beyond seven the
# colours come again with other markers.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = [(colour, MARKERS[(index + turn) % 7]) for turn in range(7) for index, colour in enumerate(COLOURS)]
# Modules outside the blocks are named below the axis.
OUTSIDE = {"color": "0.35", "marker": "*"}


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be drawn, before the work is done.

    Raises:
        MissingDependencyError: without matplotlib.
        OutputError: when the suffix is unknown or the folder is missing.
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


def plot_report(report: ProjectionReport, path: Path) -> None:
    """Draw cosine and gain of every module by depth: one row of two panels for each adapter.

    Filled markers are projected modules, hollow ones were left alone; modules without a cosine have no point. The modules of
    one kind are joined, through the median where a block holds several experts.

    Raises:
        MissingDependencyError, OutputError: as :func:`check_plot`, or when the file cannot be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(report.adapters)
    figure = Figure(figsize=(11, 4.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, adapter in zip(figure.subplots(rows, 2, squeeze=False), report.adapters, strict=True):
        _draw(axes, adapter, report.settings)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture, under a temporary name first.

    Raises:
        OutputError: when the file cannot be written.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    with described(path):
        try:
            figure.savefig(partial, dpi=150, metadata=_without_date(path))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _without_date(path: Path) -> dict[str, Any]:
    """The same report gives the same bytes: no date in the file."""
    return {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})


def _draw(axes: Sequence[Any], adapter: AdapterReport, settings: dict[str, Any]) -> None:
    left, right = axes
    shown = [module for module in adapter.modules if not math.isnan(module.cosine)]
    names, places = kinds(module.name for module in shown), _places(shown)
    styles = _styles(names)
    for kind, style in styles.items():
        modules = [module for module in shown if names[module.name] == kind]
        for axis, attribute in ((left, "cosine"), (right, "gain")):
            points = [(places[module.name], getattr(module, attribute), module.projected) for module in modules]
            axis.plot(*_medians(points), color=style["color"], linewidth=0.8, alpha=0.4)
            for filled in (True, False):
                chosen = [(x, y) for x, y, projected in points if projected is filled]
                axis.plot(
                    [x for x, _ in chosen],
                    [y for _, y in chosen],
                    **style,
                    linestyle="",
                    markerfacecolor=style["color"] if filled else "white",
                    markersize=5,
                )
        if style is not OUTSIDE:
            right.plot([], [], **style, linestyle="", label=kind)
    if settings["select"] == "threshold":
        left.axhline(settings["threshold"], color="0.3", linestyle="--", linewidth=1)
        left.annotate(
            f"threshold\n{settings['threshold']:g}", (1, settings["threshold"]), xycoords=("axes fraction", "data"),
            xytext=(4, 0), textcoords="offset points", va="center", fontsize=9, color="0.3",
        )  # fmt: skip
    gains = [module.gain for module in shown if module.gain > 0]
    if gains and max(gains) > 20 * min(gains):
        right.set_yscale("log")
    elif gains:
        right.set_ylim(0, 1.1 * max(gains))
    left.set(title="Cosine of C·ΔW and ΔW", ylabel="cosine", xlabel="block")
    right.set(title=f"Gain of {_operator(settings)}", ylabel="‖projected B‖ / ‖B‖", xlabel="block")
    without = f"; {len(adapter.modules) - len(shown)} without a cosine" if len(shown) < len(adapter.modules) else ""
    counts = f"{len(adapter.projected)} of {len(adapter.modules)} selected (filled){without}"
    left.set_title(f"{Path(adapter.adapter).name}: {counts}", loc="left", fontsize=8, y=1.06)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        _label_places(axis, names, places)
    if right.get_legend_handles_labels()[0]:
        right.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def _styles(names: dict[str, str]) -> dict[str, dict[str, str]]:
    """A style for each kind."""
    inside = dict.fromkeys(kind for name, kind in names.items() if block_of(name) is not None)
    styles = dict.fromkeys(names.values(), OUTSIDE)
    for index, kind in enumerate(inside):
        colour, marker = STYLES[index % len(STYLES)]
        styles[kind] = {"color": colour, "marker": marker}
    return styles


def _operator(settings: dict[str, Any]) -> str:
    """The operator in words."""
    if settings["operator"] == "orthogonal":
        extent = f"rank {settings['rank']}" if settings["rank"] else f"energy {settings['energy']:g}"
        return f"the orthogonal projection ({extent})"
    return {
        "frobenius": "SafeLoRA's C = V·Vᵀ/‖V‖",
        "spectral": "SafeLoRA, spectral: V·Vᵀ/σ₁(V)²",
        None: "the zero control",
    }[settings["normalize"]]


def _places(modules: Sequence[ModuleReport]) -> dict[str, float]:
    """Where each module stands on the axis: at its block's number, or beside the blocks."""
    blocks = {module.name: block_of(module.name) for module in modules}
    numbers = [block for block in blocks.values() if block is not None] or [0]
    places: dict[str, float] = {name: block for name, block in blocks.items() if block is not None}
    step = max(1.0, (max(numbers) - min(numbers)) / 12)
    outside = [name for name, block in blocks.items() if block is None]
    before = [name for name in outside if not is_after_the_blocks(name)]
    after = [name for name in outside if is_after_the_blocks(name)]
    places |= {name: min(numbers) - step * distance for distance, name in enumerate(reversed(before), 1)}
    return places | {name: max(numbers) + step * distance for distance, name in enumerate(after, 1)}


def _label_places(axis: Any, names: dict[str, str], places: dict[str, float]) -> None:
    """Ticks at whole blocks, and one with its name for every module outside them."""
    from matplotlib.ticker import MaxNLocator

    blocks = [place for name, place in places.items() if block_of(name) is not None]
    ticks = []
    if blocks:
        first, last = min(blocks), max(blocks)
        candidates = MaxNLocator(8, integer=True).tick_values(first, last) if first < last else [first]
        ticks = [tick for tick in candidates if first <= tick <= last]
    outside = [name for name in places if block_of(name) is None]
    axis.set_xticks([*ticks, *(places[name] for name in outside)])
    labels = axis.set_xticklabels([*(f"{tick:.0f}" for tick in ticks), *(names[name] for name in outside)])
    for label in labels[len(ticks) :]:
        label.set(rotation=35, horizontalalignment="right", rotation_mode="anchor", fontsize=8)


def _medians(points: Sequence[tuple[float, float, bool]]) -> tuple[list[float], list[float]]:
    """One point a block for the line: the median of the experts where a kind has several modules there."""
    values: dict[float, list[float]] = defaultdict(list)
    for place, value, _ in points:
        values[place].append(value)
    ordered = sorted(values)
    return ordered, [statistics.median(values[place]) for place in ordered]
