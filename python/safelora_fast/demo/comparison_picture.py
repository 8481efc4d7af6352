"""The picture of the training comparison: what was learned against how far the model drifted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.demo.variants import REFERENCE, UNDEFENDED
from safelora_fast.posthoc.plot import STYLES, check_plot

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

    from safelora_fast.demo.comparison_figures import Comparison, Outcome

REFERENCE_STYLE = ("#666666", "o")
PATH_COLOUR = "#8C8C8C"
MARKER = 9.0
# Where a label may stand, nearest first: distance in points, then to the right, left, above and below its marker.
PLACES = [
    (across * distance, up * distance)
    for distance in (11, 20, 32, 46)
    for across, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))
]


def draw(comparison: Comparison, path: Path) -> None:
    """Held-out narrow loss, falling to the right, against KL to the reference on general answers.

    Raises:
        MissingDependencyError, OutputError: as :func:`safelora_fast.posthoc.plot.check_plot`.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    plot(axis, comparison)
    canvas.draw()  # the layout is settled before labels are placed in it
    place_labels(axis, comparison)
    figure.savefig(path, dpi=150)


def plot(axis: Axes, comparison: Comparison) -> None:
    """Markers, error bars, and the path of the undefended update as it is weakened."""
    weakened = [(point.narrow.value, point.divergence.value) for point in comparison.weakened.values()]
    ends = [comparison.outcomes[name] for name in (REFERENCE, UNDEFENDED)]
    path = sorted([*weakened, *((end.narrow.value, end.divergence.value) for end in ends)])
    axis.plot(*zip(*path, strict=True), color=PATH_COLOUR, linewidth=1.2, linestyle="--", zorder=1)
    axis.plot(
        *zip(*weakened, strict=True), color=PATH_COLOUR, marker="o", markersize=5, markerfacecolor="white", linestyle="",
        label=f"no defence, update scaled to {', '.join(comparison.weakened)}", zorder=2,
    )  # fmt: skip
    for (colour, marker), outcome in zip(styles(len(comparison.outcomes)), comparison.outcomes.values(), strict=True):
        axis.errorbar(
            outcome.narrow.value, outcome.divergence.value, yerr=outcome.divergence.error, color=colour,
            marker=marker, markersize=MARKER, markeredgecolor="white", elinewidth=1.1, capsize=2, zorder=3,
        )  # fmt: skip
    axis.set_xlabel("loss on held-out narrow answers (nats per token): further right, more learned")
    axis.set_ylabel("KL to the reference on general answers\n(nats per token): further up, more drift")
    axis.set_title("What each defence lets a fine-tune learn, and how far the model drifts", fontsize=12)
    axis.margins(0.12)
    axis.invert_xaxis()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", frameon=False, fontsize=9)


def styles(count: int) -> list[tuple[str, str]]:
    """Colour and marker of the reference and of each variant after it."""
    return [REFERENCE_STYLE, *(STYLES[index % len(STYLES)] for index in range(count - 1))]


def place_labels(axis: Axes, comparison: Comparison) -> list[Annotation]:
    """Name every marker, where no other marker, error bar or name stands."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white")]
    outcomes = comparison.outcomes
    taken = [_marker_box(axis, outcome) for outcome in outcomes.values()]
    legend = axis.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent())
    labels = []
    for name, outcome in outcomes.items():
        setting = comparison.settings.get(name, "")
        label = axis.annotate(
            f"{name} ({setting})" if setting else name, (outcome.narrow.value, outcome.divergence.value),
            xytext=PLACES[0], textcoords="offset points", fontsize=9, color="0.1", path_effects=halo, zorder=4,
        )  # fmt: skip
        taken.append(_put(axis, label, taken))
        labels.append(label)
    return labels


def _put(axis: Axes, label: Annotation, taken: Sequence[Bbox]) -> Bbox:
    """Move a label to the first place that is inside the axes and free, and return the box that it takes up."""
    for across, up in PLACES:
        label.set(
            position=(across, up),
            horizontalalignment="center" if across == 0 else ("left" if across > 0 else "right"),
            verticalalignment="center" if up == 0 else ("bottom" if up > 0 else "top"),
        )
        box = label.get_window_extent()
        inside = axis.bbox.contains(*box.min) and axis.bbox.contains(*box.max)
        if inside and not any(box.overlaps(other) for other in taken):
            break
    return box


def _marker_box(axis: Axes, outcome: Outcome) -> Bbox:
    """The pixels of a marker and of its error bar."""
    from matplotlib.transforms import Bbox

    x, height, error = outcome.narrow.value, outcome.divergence.value, outcome.divergence.error
    low, high = axis.transData.transform([(x, height - error), (x, height + error)])
    half = MARKER * axis.figure.dpi / 72 / 2
    return Bbox([(low[0] - half, min(low[1], high[1] - half)), (low[0] + half, max(high[1], low[1] + half))])
