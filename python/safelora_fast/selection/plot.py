"""A picture of the scores with the cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.files.output import described
from safelora_fast.projection.plot import check_plot

if TYPE_CHECKING:
    from pathlib import Path

    from safelora_fast.selection.report import Selection

COLOR, CUT = "#0072B2", "#D55E00"


def plot_selection(selection: Selection, path: Path) -> None:
    """Draw the histogram of the scores.

    Raises:
        MissingDependencyError, OutputError: as :func:`~safelora_fast.projection.plot.check_plot`, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts, edges = selection.histogram()
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.stairs(counts, edges, fill=True, color=COLOR)
    axes.axvline(selection.cut, color=CUT)
    axes.annotate(
        f"{len(selection.chosen):,} chosen",
        (selection.cut, counts.max()),
        (4, -10),
        textcoords="offset points",
        color=CUT,
    )
    axes.set_xlabel("(mean NLL of misaligned models − NLL of the aligned one)/(NLL of the aligned one + ε)")
    axes.set_ylabel("rows")
    axes.spines[["top", "right"]].set_visible(False)
    with described(path):
        figure.savefig(path, dpi=150)
