"""The demo's picture: what each variant lost on narrow and on general data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.plotting import COLORS, plot_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

BARS = {"reference": "#666666", "adapter": COLORS[5], "projected": COLORS[0], "zero control": COLORS[2]}


def draw(losses: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Two panels of bars, one for each set, from zero; the reference goes on as a line."""
    titles = {
        "narrow": "Held-out narrow data\n(low: the narrow style was learned)",
        "general": "General answers\n(low: everyday questions are answered well)",
    }
    with plot_file(path, 10, 4.2) as figure:
        for axes, (measure, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
            names = list(losses)
            values = [losses[name][measure] for name in names]
            bars = axes.bar(names, values, color=[BARS[name] for name in names], width=0.65)
            axes.bar_label(bars, fmt="%.3f", padding=-16, fontsize=10, color="white")
            axes.axhline(losses["reference"][measure], color="0.5", linestyle="--", linewidth=0.9, zorder=0)
            axes.set_title(title, fontsize=11)
            axes.set_ylabel("loss (nats per answer token)")
            axes.set_ylim(0, 1.05 * max(values))
