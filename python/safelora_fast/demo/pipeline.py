"""The demo from the packaged model to the table and the picture."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from safelora_fast.demo import text
from safelora_fast.demo.constants import Recipe
from safelora_fast.demo.packaged_model import load
from safelora_fast.demo.preparation import check, make_pair, train_adapter
from safelora_fast.demo.stages import Stages
from safelora_fast.demo.terminal import bar, quiet
from safelora_fast.projection.project import project_adapter

PAGE = "demo.html"


def run(output: Path, *, seed: int = 0, source: Path | None = None, recipe: Recipe | None = None) -> dict[str, Any]:
    """Run every stage that is not finished yet, print the table, and return the report.

    Args:
        output: folder of the demo.
        seed: of both fine-tunes.
        source: a folder with an aligned model and its tokenizer, instead of the packaged 135M model.
        recipe: the numbers of the demo.
    """
    check(source)
    recipe = recipe or Recipe()
    console = Console(highlight=False)
    start = time.perf_counter()
    with quiet():
        report = _run(Path(output), seed, source, recipe, console)
    report["seconds"] = time.perf_counter() - start
    (Path(output) / "demo_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    words = reading(report["losses"], report["projection"])
    from safelora_fast.demo.page import write_projection

    write_projection(report["losses"], words, seed, Path(output) / PAGE)
    _show(report, words, console, Path(output))
    return report


def _run(output: Path, seed: int, source: Path | None, recipe: Recipe, console: Console) -> dict[str, Any]:
    number = iter(range(1, 99))

    def announce(title: str, reused: bool) -> None:
        console.print(f"[bold]{next(number)}.[/] {title}" + (" [dim](reused)[/]" if reused else ""), soft_wrap=True)

    stages = Stages(output, announce)
    aligned, base = make_pair(stages, seed, source, recipe, console)
    adapter = stages.make(
        "adapter",
        "adapter: LoRA fine-tune on 96 narrow answers, in the manner of a lighthouse log",
        recipe.adapter(seed),
        lambda folder: _train_adapter(aligned, folder, seed, recipe, console),
    )
    variants = {"adapter": adapter}
    for name, operator in (("projected", "safelora"), ("zero control", "zero")):
        variants[name] = stages.make(
            name.replace(" ", "-"),
            f"{name}: --operator {operator} --threshold {recipe.threshold:g}",
            {"operator": operator, "threshold": recipe.threshold},
            lambda folder, operator=operator: _project(adapter, aligned, base, folder, operator, recipe),  # type: ignore[misc]
        )
    measured = stages.make(
        "measured",
        "measure the loss on held-out narrow answers and on general answers",
        {},
        lambda folder: _measure(aligned, variants, folder, console),
    )
    losses = json.loads((measured / "losses.json").read_text(encoding="utf-8"))
    from safelora_fast.demo.plot import draw

    draw(losses, output / "demo.png")
    projection = json.loads((variants["projected"] / "projected" / "safelora_report.json").read_text(encoding="utf-8"))
    return {
        "base_is_a_stand_in": True,
        "losses": losses,
        "projection": _summary(projection["adapters"][0]),
        "stage_seconds": stages.seconds,
    }


def _train_adapter(aligned: Path, folder: Path, seed: int, recipe: Recipe, console: Console) -> None:
    with bar(console, "LoRA fine-tune") as progress:
        train_adapter(aligned, folder, seed, recipe, progress)


def _project(adapter: Path, aligned: Path, base: Path, folder: Path, operator: str, recipe: Recipe) -> None:
    project_adapter(
        adapter, aligned=aligned, base=base, output=folder / "projected", operator=operator, threshold=recipe.threshold
    )


def _measure(aligned: Path, variants: dict[str, Path], folder: Path, console: Console) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    from safelora_fast.demo.train_loop import mean_loss

    tokenizer = AutoTokenizer.from_pretrained(aligned)
    sets = {
        name: [text.conversation(tokenizer, row) for row in text.rows(rows)]
        for name, rows in (("narrow", "narrow_held_out"), ("general", "general"))
    }
    losses: dict[str, dict[str, float]] = {}
    with bar(console, "loss") as progress:
        for index, name in enumerate(["reference", *variants]):
            model = load(aligned)
            if name in variants:
                place = variants[name]
                model = PeftModel.from_pretrained(model, place if name == "adapter" else place / "projected")
            losses[name] = {key: mean_loss(model, examples, tokenizer.pad_token_id) for key, examples in sets.items()}
            progress(index + 1, len(variants) + 1, losses[name]["general"])
    (folder / "losses.json").write_text(json.dumps(losses, indent=2) + "\n", encoding="utf-8")


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


def _show(report: dict[str, Any], words: str, console: Console, output: Path) -> None:
    losses = report["losses"]
    table = Table(title="loss in nats per answer token", title_justify="left", box=None, pad_edge=False)
    for column in ("", "held-out narrow", "against reference", "general", "against reference"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, measured in losses.items():
        drift = {key: measured[key] - losses["reference"][key] for key in measured}
        cells = [cell for key in ("narrow", "general") for cell in (f"{measured[key]:.3f}", f"{drift[key]:+.3f}")]
        table.add_row(name, *cells)
    console.print(table)
    console.print(words, soft_wrap=True)
    console.print(
        f"everything is in {output}; the report is {output / PAGE}, the picture {output / 'demo.png'} "
        f"({report['seconds']:.0f} s)",
        soft_wrap=True,
    )


def reading(losses: dict[str, dict[str, float]], projection: dict[str, Any]) -> str:
    """What the figures say, in words that follow from them."""
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
    if apart < 0.02:
        lines.append(
            f"Projected and zero control differ by at most {apart:.3f}: with this V the paper's C nearly deletes the update of "
            "the modules that it projects. The cosine chose the modules; the projection itself did little more than zero them."
        )
    lines.append("The base model is a stand-in: with a real one V is larger, and cosines and gains are others.")
    return "\n".join(lines)
