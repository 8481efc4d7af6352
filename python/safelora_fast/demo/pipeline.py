"""The projection demo, from the packaged model to the report, the table and the plot."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from safelora_fast.demo.ingredients import Sizes, check_packages, configure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safelora_fast.compare.comparison import CompareConfig

Losses = dict[str, dict[str, float]]
ALIKE = 0.02  # nats; projected and zero control count as alike below this difference


def run(output: Path, *, seed: int = 0, source: Path | None = None, sizes: Sizes | None = None) -> dict[str, Any]:
    """Run every unfinished stage, print the table, and return the report.

    Args:
        output: folder of the demo.
        seed: seed of both fine-tunes.
        source: a folder with an aligned model and its tokenizer, instead of the packaged 135M model.
        sizes: settings of the demo.

    Raises:
        MissingDependencyError: a required package, such as torch or peft, or the package of the model is missing.
        OutputError: the folder cannot be written.
    """
    from safelora_fast.files.store import to_json

    check_packages()
    output, start = Path(output), time.perf_counter()
    console = Console(highlight=False)
    console.print(
        f"Two fine-tunes of a 135M model, two projections, and a comparison, in {output} (1.2 GB): a few minutes on two idle "
        "cores. Nothing is downloaded; a second run reuses what is there.",
        soft_wrap=True,
    )
    config, ingredients = configure("projection.yaml", output, seed=seed, source=source, sizes=sizes)
    _compare(config, console)
    losses = _losses(config)
    made = json.loads((ingredients["projected"] / "safelora_report.json").read_text(encoding="utf-8"))
    projection = _summary(made["adapters"][0])
    report = {
        "base_is_a_stand_in": True,
        "losses": losses,
        "projection": projection,
        "stage_seconds": ingredients.seconds,
        "seconds": time.perf_counter() - start,
    }
    (output / "demo_report.json").write_text(to_json(report) + "\n", encoding="utf-8")
    draw(losses, output / "demo.png")
    _show(losses, console)
    console.print(reading(losses, projection), soft_wrap=True)
    page = config.output / "report.html"
    console.print(
        f"everything is in {output}; the report is {page}, the picture {output / 'demo.png'} ({report['seconds']:.0f} s)",
        soft_wrap=True,
    )
    return report


def _compare(config: CompareConfig, console: Console) -> None:
    from safelora_fast.compare.compare import compare
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.models.quiet_libraries import quiet_libraries

    with quiet_libraries(), ProgressBar(brief=True) as progress:
        compare(config, progress=progress, announce=lambda line: console.print(line, markup=False, soft_wrap=True))


def _losses(config: CompareConfig) -> Losses:
    """Return the mean loss of each variant on each set, in nats per completion token."""
    from safelora_fast.compare.comparison import reference_of, runs_of

    variants = [reference_of(config), *(runs_of(config, spec)[0] for spec in config.runs)]
    losses: Losses = {}
    for variant in variants:
        sets = {name: answers for name, answers in variant.read("drift").items() if name in {"narrow", "general"}}
        losses[variant.name] = {
            name: sum(one["loss"] for one in answers) / sum(one["tokens"] for one in answers)
            for name, answers in sets.items()
        }
    return losses


def _summary(adapter: dict[str, Any]) -> dict[str, Any]:
    cosines = [module["cosine"] for module in adapter["modules"] if module["cosine"] is not None]
    gains = sorted(module["gain"] for module in adapter["modules"] if module["gain"] is not None)
    return {
        "modules": adapter["counts"]["modules"],
        "projected": adapter["counts"]["projected"],
        "cosine_lowest": min(cosines),
        "cosine_highest": max(cosines),
        "gain_median": gains[len(gains) // 2],
    }


def _show(losses: Losses, console: Console) -> None:
    table = Table(title="loss in nats per answer token", title_justify="left", box=None, pad_edge=False)
    for column in ("", "held-out narrow", "against reference", "general", "against reference"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, measured in losses.items():
        drift = {key: measured[key] - losses["reference"][key] for key in measured}
        cells = [cell for key in ("narrow", "general") for cell in (f"{measured[key]:.3f}", f"{drift[key]:+.3f}")]
        table.add_row(name, *cells)
    console.print(table)


def draw(losses: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw a bar chart for each set, with a line at the reference."""
    from safelora_fast.plotting import COLORS, plot_file

    colors = {"reference": "#666666", "adapter": COLORS[5], "projected": COLORS[0], "zero control": COLORS[2]}
    titles = {
        "narrow": "Held-out narrow data\n(low: the narrow style was learned)",
        "general": "General answers\n(low: everyday questions are answered well)",
    }
    with plot_file(path, 10, 4.2) as figure:
        for axes, (measure, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
            values = [losses[name][measure] for name in losses]
            bars = axes.bar(list(losses), values, color=[colors[name] for name in losses], width=0.65)
            axes.bar_label(bars, fmt="%.3f", padding=-16, fontsize=10, color="white")
            axes.axhline(losses["reference"][measure], color="0.5", linestyle="--", linewidth=0.9, zorder=0)
            axes.set_title(title, fontsize=11)
            axes.set_ylabel("loss (nats per answer token)")
            axes.set_ylim(0, 1.05 * max(values))


def reading(losses: Losses, projection: dict[str, Any]) -> str:
    """Return the conclusions from the values, as sentences."""
    adapter, projected, zero, reference = (
        losses[name] for name in ("adapter", "projected", "zero control", "reference")
    )
    learned = reference["narrow"] - adapter["narrow"]
    kept = (reference["narrow"] - projected["narrow"]) / learned if learned else 0.0
    drift, drift_left = (variant["general"] - reference["general"] for variant in (adapter, projected))
    apart = max(abs(projected[key] - zero[key]) for key in ("narrow", "general"))
    lines = [
        f"{projection['projected']} of {projection['modules']} modules were projected: their cosines lie between "
        f"{projection['cosine_lowest']:.3f} and {projection['cosine_highest']:.3f}, "
        f"and the median gain ‖CB‖/‖B‖ is {projection['gain_median']:.2g}.",
        f"The projected adapter keeps {100 * kept:.0f} % of what was learned on narrow data; "
        f"its loss on general answers moved by {drift_left:+.3f}, the adapter's own by {drift:+.3f}.",
    ]
    if apart < ALIKE:
        lines.append(
            f"Projected and zero control differ by at most {apart:.3f}: with this V the paper's C nearly deletes the update of "
            "the modules that it projects. The cosine chose the modules; the projection itself did little more than zero them."
        )
    lines.append("The base model is a stand-in: with a real one V is larger, and cosines and gains are others.")
    return "\n".join(lines)
