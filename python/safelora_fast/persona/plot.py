"""A picture of how well each block separates the two sides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.projection.plot import STYLES, check_plot, save_figure

if TYPE_CHECKING:
    from pathlib import Path

    from safelora_fast.persona_vector import PersonaVector


def plot_separation(vector: PersonaVector, path: Path) -> None:
    """Draw effect and held-out share by block, with the suggested block and those that it was chosen from.

    Raises:
        MissingDependencyError: without matplotlib.
        OutputError: when the suffix is unknown or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    titles = ("Effect (Cohen's d), held out", "Share on its own side of the midpoint, held out")
    values = [[one.effect for one in vector.separation], [one.share for one in vector.separation]]
    for axis, title, figures, (colour, marker) in zip(axes, titles, values, STYLES, strict=False):
        axis.axvspan(vector.candidates[0] - 0.5, vector.candidates[-1] + 0.5, color="0.93")
        axis.plot(range(len(figures)), figures, color=colour, marker=marker, markersize=4, linewidth=1)
        if vector.suggestion is not None:
            axis.axvline(vector.suggestion, color="0.3", linestyle="--", linewidth=1)
            axis.annotate(
                f"block {vector.suggestion}", (vector.suggestion, 0.02), xycoords=("data", "axes fraction"), xytext=(4, 0),
                textcoords="offset points", fontsize=9, color="0.3",
            )  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("block")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylim(bottom=min(0.0, axes[0].get_ylim()[0]))
    axes[1].set_ylim(0, 1.03)
    axes[1].axhline(0.5, color="0.3", linestyle=":", linewidth=1)
    figure.suptitle(f"{vector.trait}: blocks suggested from are shaded", fontsize=11)
    save_figure(figure, path)
