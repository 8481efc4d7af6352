"""What the training comparison found, as tables and as sentences that follow from its figures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.table import Table

from safelora_fast.demo.variants import REFERENCE, UNDEFENDED

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from safelora_fast.demo.comparison_figures import Comparison

PAGE = "demo_train.html"
CLEAR = 2.0  # standard errors


def show(comparison: Comparison, seconds: float, console: Console, output: Path) -> None:
    """Print the tables, what they say, and where everything is."""
    console.print(outcome_table(comparison))
    console.print(cost_table(comparison))
    console.print(reading(comparison), soft_wrap=True)
    console.print(
        f"everything is in {output}; the report is {output / PAGE}, the picture {output / 'demo_train.png'} ({seconds:.0f} s)",
        soft_wrap=True,
    )


def outcome_table(comparison: Comparison) -> Table:
    """Learning and drift of the reference and of every variant."""
    table = _table("nats per answer token, ± one standard error over the answers of one run")
    for column in ("", "weight", "narrow", "learned", "KL general", "general", "change"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, outcome in comparison.outcomes.items():
        variant = name != REFERENCE
        table.add_row(
            name,
            comparison.settings.get(name, "–"),
            f"{outcome.narrow.value:.3f}",
            f"{100 * comparison.learned(name):.0f} %" if variant else "–",
            f"{outcome.divergence.value:.3f} ±{outcome.divergence.error:.3f}" if variant else "–",
            f"{outcome.general.value:.3f}",
            f"{outcome.general_change.value:+.3f}" if variant else "–",
        )
    return table


def cost_table(comparison: Comparison) -> Table:
    """Time and memory of every variant's training."""
    table = _table("seconds, and peak memory of each training's own process")
    for column in ("", "step", "ratio", "all steps", "at the end", "peak"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, cost in comparison.costs.items():
        table.add_row(
            name,
            f"{cost.step:.2f} s",
            f"{cost.relative:.2f}×",
            f"{cost.steps:.0f} s",
            f"{cost.end:.1f} s",
            f"{cost.peak / 1e9:.2f} GB",
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False)


def reading(comparison: Comparison) -> str:
    """What the figures say, in sentences that follow from them."""
    outcomes = comparison.outcomes
    reference, undefended = outcomes[REFERENCE], outcomes[UNDEFENDED]
    lines = [
        f"Without defence the loss on held-out narrow answers went from {reference.narrow.value:.2f} to "
        f"{undefended.narrow.value:.2f}, and the model moved {undefended.divergence.value:.3f} nats from the reference on "
        "general answers. Each defence beside that, and beside the undefended update scaled down until it has learned as "
        "little:"
    ]
    lines += [f"- {_beside_weakening(comparison, name)}" for name in comparison.settings]
    lines += _ingredients(comparison)
    lines += _loss_against_divergence(comparison)
    variants = [outcome for name, outcome in outcomes.items() if name != REFERENCE]
    narrow, divergence = (
        CLEAR * max(mean.error for mean in means)
        for means in ([each.narrow_change for each in variants], [each.divergence for each in variants])
    )
    lines.append(
        f"Differences below about {narrow:.2f} in narrow loss and {divergence:.3f} in KL are within the noise of so few "
        "answers, and one seed says nothing of the noise between runs."
    )
    lines.append(
        "A model of 135M parameters and 96 harmless rows show what each defence holds back, not whether it prevents "
        "emergent misalignment; the subspace is that of a stand-in base model, and a real one differs."
    )
    return "\n".join(lines)


def _beside_weakening(comparison: Comparison, name: str) -> str:
    drift, usual = comparison.outcomes[name].divergence, comparison.outcomes[UNDEFENDED].divergence
    start = (
        f"{name} ({comparison.settings[name]}): {100 * comparison.learned(name):.0f} % of the learning with "
        f"{100 * drift.value / usual.value:.0f} % of the drift; "
    )
    weakened = comparison.weakened_drift(name)
    if math.isnan(weakened):
        return start + "no scaling of the undefended update learns that much."
    verdict = "no clear difference"
    if abs(drift.value - weakened) > CLEAR * drift.error:
        verdict = "it drifts less than that" if drift.value < weakened else "it drifts more than that"
    return start + f"scaling down: {100 * weakened / usual.value:.0f} %, so {verdict}."


def _ingredients(comparison: Comparison) -> list[str]:
    """What Interleaving++ chose from what, and how sure the steering vector is."""
    lines = []
    selection = comparison.ingredients.get("selection")
    if selection is not None:
        lines.append(
            f"Interleaving++ took {selection['chosen']} of {selection['rows'] - selection['refusals']} safe rows "
            f"({selection['refusals']} refusals left out), those with a score of {selection['cut']:.2f} or more under an "
            "adapter for the manner of station announcements; interleaving took any of 28 of them."
        )
    persona = comparison.ingredients.get("persona")
    if persona is not None:
        told = (
            "which was too little to measure how well it tells answers apart"
            if math.isnan(persona["share"])
            else f"which tells {100 * persona['share']:.0f} % of held-out answers of the model itself apart"
        )
        lines.append(
            f"Steering added the vector of block {persona['block']} of {persona['blocks']}, {told}; it is gone when the "
            "losses are measured."
        )
    return lines


def _loss_against_divergence(comparison: Comparison) -> list[str]:
    """A warning where the general loss would call a drifted model better."""
    better = [
        name
        for name, outcome in comparison.outcomes.items()
        if outcome.general_change.value < -CLEAR * outcome.general_change.error
    ]
    if not better:
        return []
    return [
        f"The loss on general answers fell below the reference's for {', '.join(better)}: these answers are short and plain, "
        "as the narrow ones are, so training on those can lower it. It is no measure of drift; KL is."
    ]
