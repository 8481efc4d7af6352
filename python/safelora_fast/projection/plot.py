"""The plot of cosine and gain by layer."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.module_names import is_after_the_layers, kinds, layer_of
from safelora_fast.plotting import STYLES, mark_line, plot_file
from safelora_fast.projection.operators import operator_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.projection.report import AdapterReport, ModuleReport, ProjectionReport

# Style of modules outside the layers; their names are tick labels.
OUTSIDE = {"color": "0.35", "marker": "*"}


def plot_report(report: ProjectionReport, path: Path) -> None:
    """Plot cosine and gain of each module by depth, in one row of two panels per adapter.

    Filled markers are projected modules; hollow markers are unchanged ones. Modules without a cosine have no marker. A
    line connects modules of one kind; it passes through the median if a layer has several experts.

    Raises:
        MissingDependencyError: see :func:`~safelora_fast.plotting.plot_file`.
        OutputError: see :func:`~safelora_fast.plotting.plot_file`.
    """
    rows = len(report.adapters)
    with plot_file(path, 11, 4.2 * rows) as figure:
        for axes, adapter in zip(figure.subplots(rows, 2, squeeze=False), report.adapters, strict=True):
            _draw(axes, adapter, report.settings)


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
        mark_line(left, settings["threshold"], f"threshold\n{settings['threshold']:g}")
    gains = [module.gain for module in shown if module.gain > 0]
    if gains and max(gains) > 20 * min(gains):
        right.set_yscale("log")
    elif gains:
        right.set_ylim(0, 1.1 * max(gains))
    left.set(title="Cosine of C·ΔW and ΔW", ylabel="cosine", xlabel="layer")
    right.set(title=f"Gain of {operator_of(settings).title(settings)}", ylabel="‖projected B‖ / ‖B‖", xlabel="layer")
    without = f"; {len(adapter.modules) - len(shown)} without a cosine" if len(shown) < len(adapter.modules) else ""
    counts = f"{len(adapter.projected)} of {len(adapter.modules)} selected (filled){without}"
    left.set_title(f"{Path(adapter.adapter).name}: {counts}", loc="left", fontsize=8, y=1.06)
    for axis in axes:
        axis.grid(alpha=0.25)
        _label_places(axis, names, places)
    if right.get_legend_handles_labels()[0]:
        right.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def _styles(names: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return the marker and color of each kind of module."""
    inside = dict.fromkeys(kind for name, kind in names.items() if layer_of(name) is not None)
    styles = dict.fromkeys(names.values(), OUTSIDE)
    for index, kind in enumerate(inside):
        color, marker = STYLES[index % len(STYLES)]
        styles[kind] = {"color": color, "marker": marker}
    return styles


def _places(modules: Sequence[ModuleReport]) -> dict[str, float]:
    """Return the x position of each module: its layer number, or a place before or after the layers."""
    layers = {module.name: layer_of(module.name) for module in modules}
    numbers = [layer for layer in layers.values() if layer is not None] or [0]
    places: dict[str, float] = {name: layer for name, layer in layers.items() if layer is not None}
    step = max(1.0, (max(numbers) - min(numbers)) / 12)
    outside = [name for name, layer in layers.items() if layer is None]
    before = [name for name in outside if not is_after_the_layers(name)]
    after = [name for name in outside if is_after_the_layers(name)]
    places |= {name: min(numbers) - step * distance for distance, name in enumerate(reversed(before), 1)}
    return places | {name: max(numbers) + step * distance for distance, name in enumerate(after, 1)}


def _label_places(axis: Any, names: dict[str, str], places: dict[str, float]) -> None:
    """Set ticks at layer numbers, plus one labeled tick for each module outside the layers."""
    from matplotlib.ticker import MaxNLocator

    layers = [place for name, place in places.items() if layer_of(name) is not None]
    ticks = []
    if layers:
        first, last = min(layers), max(layers)
        candidates = MaxNLocator(8, integer=True).tick_values(first, last) if first < last else [first]
        ticks = [tick for tick in candidates if first <= tick <= last]
    outside = [name for name in places if layer_of(name) is None]
    axis.set_xticks([*ticks, *(places[name] for name in outside)])
    labels = axis.set_xticklabels([*(f"{tick:.0f}" for tick in ticks), *(names[name] for name in outside)])
    for label in labels[len(ticks) :]:
        label.set(rotation=35, horizontalalignment="right", rotation_mode="anchor", fontsize=8)


def _medians(points: Sequence[tuple[float, float, bool]]) -> tuple[list[float], list[float]]:
    """Return one point per position for the line: the median over modules (such as experts) of the same layer."""
    values: dict[float, list[float]] = defaultdict(list)
    for place, value, _ in points:
        values[place].append(value)
    ordered = sorted(values)
    return ordered, [statistics.median(values[place]) for place in ordered]
