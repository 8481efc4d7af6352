"""The demo's picture: what each variant lost on narrow and on general data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.projection.plot import check_plot

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

COLOURS = {"reference": "#666666", "adapter": "#D55E00", "projected": "#0072B2", "zero control": "#009E73"}


def draw(losses: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Two panels of bars, one for each set, from zero; the reference goes on as a line."""
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {
        "narrow": "Held-out narrow data\n(low: the narrow style was learned)",
        "general": "General answers\n(low: everyday questions are answered well)",
    }
    for axis, (measure, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        names = list(losses)
        values = [losses[name][measure] for name in names]
        bars = axis.bar(names, values, color=[COLOURS.get(name, "#CC79A7") for name in names], width=0.65)
        axis.bar_label(bars, fmt="%.3f", padding=-16, fontsize=10, color="white")
        axis.axhline(losses["reference"][measure], color="0.5", linestyle="--", linewidth=0.9, zorder=0)
        axis.set_title(title, fontsize=11)
        axis.set_ylabel("loss (nats per answer token)")
        axis.set_ylim(0, 1.05 * max(values))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
