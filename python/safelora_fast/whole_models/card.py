"""The model card of a projected whole model."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from safelora_fast.checkpoints.model_card import code, hub_id, table
from safelora_fast.projection.operators import operator_of
from safelora_fast.projection.report import published

if TYPE_CHECKING:
    from safelora_fast.projection.report import ProjectionReport


def render(report: ProjectionReport) -> str:
    """Return the card as Markdown with the front matter for the Hub. The modules are in the report."""
    base = hub_id(str(report.aligned["source"]))
    report = published(report)
    (model,) = report.adapters
    operator = operator_of(report.settings)
    weight = f"W ← {operator.formula}" if operator.adds else f"W ← W_aligned + {operator.formula}"
    gains = [module.gain for module in model.projected]
    lines = [
        "---",
        *([] if base is None else [f"base_model: {base}"]),
        "tags:",
        "- safelora",
        "- alignment",
        "---",
        "",
        "# Full fine-tune, projected onto the alignment subspace",
        "",
        f"{len(model.projected)} of {len(model.modules)} modules were projected with `safelora-fast`; the others are unchanged. "
        "`safelora_report.json` has every module.",
        "",
        *table(
            {
                "fine-tuned model": code(model.adapter),
                "aligned model": code(str(report.aligned["source"])),
                "base model": code(str(report.base["source"])),
                "operator": f"{operator.title(report.settings)}: {weight}",
                "selection": report.selection,
                "norms, biases, embeddings": "as reported: " + str(report.settings["others"]),
                "median gain": f"{statistics.median(gains):.4g}" if gains else "–",
                "median ‖V‖/‖W_aligned‖": f"{model.v_ratio:.4g}",
                "safelora-fast": report.versions["safelora-fast"],
            }
        ),
        "V is the aligned weight minus the base weight, and B is the fine-tuned weight minus the aligned one.",
        "",
        "## Sources",
        "",
        "- Hsu et al. 2024, Safe LoRA, arXiv 2405.16833, section 4.2",
    ]
    return "\n".join(lines) + "\n"
