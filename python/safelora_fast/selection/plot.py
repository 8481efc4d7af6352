"""A plot of the scores with the cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.plotting import COLORS, mark_line, plot_file

if TYPE_CHECKING:
    from pathlib import Path

    from safelora_fast.selection.report import Selection

COLOR, CUT = COLORS[0], COLORS[5]


def plot_selection(selection: Selection, path: Path) -> None:
    """Draw the histogram of the scores.

    Raises:
        MissingDependencyError, OutputError: as :func:`~safelora_fast.projection.plot.check_plot`, or the file cannot be written.
    """
    counts, edges = selection.histogram()
    with plot_file(path, 7, 4) as figure:
        axes = figure.add_subplot()
        axes.stairs(counts, edges, fill=True, color=COLOR)
        mark_line(axes, selection.cut, f"{len(selection.chosen):,} chosen", vertical=True, color=CUT)
        axes.set_xlabel("(mean NLL of misaligned models − NLL of the aligned one)/(NLL of the aligned one + ε)")
        axes.set_ylabel("examples")
