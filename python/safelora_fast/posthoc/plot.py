"""A picture of cosine and gain by depth, with the threshold drawn in."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import MissingDependencyError, OutputError
from safelora_fast.posthoc.output import described

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from safelora_fast.posthoc.report import AdapterReport, ModuleReport, ProjectionReport

SUFFIXES = {".png", ".svg", ".pdf"}
# Okabe and Ito's colours, which people with any colour vision can tell apart, and a marker each for print.
STYLES = [
    ("#0072B2", "o"),
    ("#E69F00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#D55E00", "P"),
    ("#000000", "X"),
]
LAYER = re.compile(r"\.(\d+)\.")


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be drawn, before the work is done.

    Raises:
        MissingDependencyError: without matplotlib.
        OutputError: when the suffix is unknown or the folder is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise MissingDependencyError("a plot needs matplotlib: pip install 'safelora-fast[plot]'") from None
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"{path}: a plot is one of {', '.join(sorted(SUFFIXES))}, not {path.suffix!r}")
    if not path.resolve().parent.is_dir():
        raise OutputError(f"{path}: the folder {path.resolve().parent} does not exist")


def plot_report(report: ProjectionReport, path: Path) -> None:
    """Draw cosine and gain of every module by depth: one row of two panels for each adapter.

    Filled markers are projected modules, hollow ones were left alone.

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
    kinds = list(dict.fromkeys(_kind(module) for module in adapter.modules))
    for index, kind in enumerate(kinds):
        colour, marker = STYLES[index % len(STYLES)]
        modules = [module for module in adapter.modules if _kind(module) == kind]
        for axis, attribute in ((left, "cosine"), (right, "gain")):
            axis.plot([], [], color=colour, marker=marker, linestyle="", label=kind)
            points = [(_depth(module), getattr(module, attribute), module.projected) for module in modules]
            points = [point for point in points if not math.isnan(point[1])]
            axis.plot(
                *zip(*[point[:2] for point in points], strict=True), color=colour, linewidth=0.8, alpha=0.4
            ) if points else None
            for filled in (True, False):
                chosen = [point[:2] for point in points if point[2] is filled]
                if chosen:
                    face = colour if filled else "white"
                    axis.plot(
                        *zip(*chosen, strict=True),
                        color=colour,
                        marker=marker,
                        linestyle="",
                        markerfacecolor=face,
                        markersize=5,
                    )
    if settings["select"] == "threshold":
        left.axhline(settings["threshold"], color="0.3", linestyle="--", linewidth=1)
        left.annotate(
            f"threshold {settings['threshold']:g}", (1, settings["threshold"]), xycoords=("axes fraction", "data"),
            xytext=(-4, 3), textcoords="offset points", ha="right", fontsize=9, color="0.3",
        )  # fmt: skip
    gains = [module.gain for module in adapter.modules if module.gain > 0]
    if gains and max(gains) > 20 * min(gains):
        right.set_yscale("log")
    elif gains:
        right.set_ylim(0, 1.1 * max(gains))
    left.set(title="Cosine of C·ΔW and ΔW", ylabel="cosine", xlabel="block")
    right.set(title="Gain of the operator on B", ylabel="‖OB‖ / ‖B‖", xlabel="block")
    name = Path(adapter.adapter).name
    left.set_title(
        f"{name}: {len(adapter.projected)} of {len(adapter.modules)} selected (filled)", loc="left", fontsize=8, y=1.06
    )
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    right.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def _kind(module: ModuleReport) -> str:
    """The last words of the name, without numbers: q_proj, experts.gate_up_proj."""
    return LAYER.sub(".", "." + module.name + ".").strip(".").rsplit(".", 1)[-1]


def _depth(module: ModuleReport) -> int:
    match = LAYER.search("." + module.name + ".")
    return int(match[1]) if match else 0
