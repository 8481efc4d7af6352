"""Plot how well each layer separates the two sides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.plotting import STYLES, mark_line, plot_file

if TYPE_CHECKING:
    from pathlib import Path

    from safelora_fast.persona_vector import PersonaVector


def plot_separation(vector: PersonaVector, path: Path) -> None:
    """Draw effect and held-out share by layer, and mark the suggested layer and its candidates.

    Raises:
        MissingDependencyError: matplotlib is missing.
        OutputError: the suffix is unknown, or the file cannot be written.
    """
    titles = ("Effect (Cohen's d), held out", "Share on its own side of the midpoint, held out")
    values = [[one.effect for one in vector.separation], [one.share for one in vector.separation]]
    with plot_file(path, 10, 4) as figure:
        axes = figure.subplots(1, 2)
        for axis, title, metric, (color, marker) in zip(axes, titles, values, STYLES, strict=False):
            axis.axvspan(vector.candidates[0] - 0.5, vector.candidates[-1] + 0.5, color="0.93")
            axis.plot(range(len(metric)), metric, color=color, marker=marker, markersize=4, linewidth=1)
            if vector.suggestion is not None:
                mark_line(axis, vector.suggestion, f"layer {vector.suggestion}", vertical=True)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("layer")
            axis.grid(alpha=0.25)
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].set_ylim(bottom=min(0.0, axes[0].get_ylim()[0]))
        axes[1].set_ylim(0, 1.03)
        axes[1].axhline(0.5, color="0.3", linestyle=":", linewidth=1)
        figure.suptitle(f"{vector.trait}: layers suggested from are shaded", fontsize=11)
