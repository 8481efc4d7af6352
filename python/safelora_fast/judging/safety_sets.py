"""Over-refusal and harm sets of inspect-evals, which run on a served model: what they measure, and what they need.

The sets of lm-evaluation-harness (toxigen, truthfulqa, wmdp, …) are tasks that `evaluate --tasks` runs itself.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SafetySet:
    """A set of prompts.

    Attributes:
        measures: what it measures.
        data: where its prompts come from; none of them are in the package.
    """

    measures: str
    data: str


SETS = {
    "xstest": SafetySet("over-refusal", "walledai/XSTest on the Hub, whose terms must be accepted"),
    "coconot": SafetySet("over-refusal and noncompliance", "allenai/coconot on the Hub"),
    "fortress_benign": SafetySet("over-refusal", "ScaleAI/fortress_public on the Hub"),
    "fortress_adversarial": SafetySet("harm", "ScaleAI/fortress_public on the Hub"),
    "strong_reject": SafetySet("harm", "a file of alexandrasouly/strongreject on GitHub"),
    "agentharm_benign": SafetySet("over-refusal by agents", "ai-safety-institute/AgentHarm on the Hub"),
    "agentharm": SafetySet("harm by agents", "ai-safety-institute/AgentHarm on the Hub"),
    "air_bench": SafetySet("harm, by regulation", "stanford-crfm/air-bench-2024 on the Hub"),
}


def set_needs(name: str) -> str | None:
    """Return what a set of inspect-evals needs, in one line; None if there is no such set."""
    found = SETS.get(name)
    if found is None:
        return None
    return (
        f"{name} ({found.measures}) is a task of inspect-evals and runs on a served model, not here: pip install "
        f"inspect-evals, serve the model with its adapter, and run inspect eval inspect_evals/{name}; its prompts come from "
        f"{found.data}"
    )
