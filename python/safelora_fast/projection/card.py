"""The model card that goes with a projected adapter."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from safelora_fast.checkpoints.module_names import natural_order
from safelora_fast.projection.bypass import bypass_note
from safelora_fast.projection.shown_models import base_model, published, shown_model

if TYPE_CHECKING:
    from safelora_fast.projection.report import AdapterReport, ModuleReport, ProjectionReport

OPERATORS = {
    "safelora": "SafeLoRA, B ← C·B with C = V·Vᵀ/‖V‖_F",
    "spectral": "SafeLoRA with spectral normalisation, B ← V·Vᵀ·B/σ₁(V)²",
    "orthogonal": "orthogonal projection, B ← U_k·U_kᵀ·B with the leading left singular vectors of V",
    "zero": "control, B ← 0",
}


def render(report: ProjectionReport, index: int) -> str:
    """The card of one adapter of the run, as Markdown with the front matter that the Hub reads."""
    report = published(report)
    adapter = report.adapters[index]
    settings = report.settings
    operator = "spectral" if settings["normalize"] == "spectral" else settings["operator"]
    lines = [
        "---",
        "library_name: peft",
        *base_model(report.aligned["source"], adapter.trained_on),
        "tags:",
        "- lora",
        "- safelora",
        "- alignment",
        "---",
        "",
        "# LoRA adapter, projected onto the alignment subspace",
        "",
        f"{len(adapter.projected)} of {len(adapter.modules)} adapted modules were projected with `safelora-fast`; "
        "the others, and every other tensor, are those of the input.",
        "",
        "| | |",
        "| --- | --- |",
        f"| input adapter | {_cell(adapter.adapter)} |",
        f"| aligned model | {_source(report.aligned)} |",
        f"| base model | {_source(report.base)} |",
        f"| operator | {OPERATORS[operator]} |",
        f"| selection | {report.selection} |",
        f"| median ‖V‖/‖W_aligned‖ | {_figure(adapter.v_ratio)} |",
        f"| safelora-fast | {report.versions['safelora-fast']} |",
        "",
        "V is the aligned weight minus the base weight. The cosine is that of C·ΔW and ΔW; the gain is the Frobenius norm of the",
        "operator's B over that of B: far below 1, the update of that module is nearly gone.",
        "",
        "## Modules",
        "",
        "| module | cosine | projected | gain | ‖B‖ before | ‖B‖ after | ‖V‖ |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
        *(_row(module) for module in sorted(adapter.modules, key=lambda module: natural_order(module.name))),
        "",
        *_excluded(adapter),
        *_copied(adapter),
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({shown_model(report.aligned['source'])!r})",
        'model = PeftModel.from_pretrained(model, "path/to/this/folder")',
        "```",
        "",
        "## Sources",
        "",
        "- Hsu et al. 2024, Safe LoRA, arXiv 2405.16833",
        "- Kaczér et al. 2025, In-training defences against emergent misalignment, arXiv 2508.06249",
    ]
    return "\n".join(lines) + "\n"


def _row(module: ModuleReport) -> str:
    done = "yes" if module.projected else f"no: {module.reason}"
    figures = (module.gain, module.b_norm, module.b_norm_after, module.v_norm)
    cosine, *others = (_figure(value) for value in (module.cosine, *figures))
    return f"| {_cell(module.name)} | {cosine} | {done} | {' | '.join(others)} |"


def _excluded(adapter: AdapterReport) -> list[str]:
    if not adapter.excluded:
        return []
    modules = (f"- {_cell(name)}" for name in sorted(adapter.excluded, key=natural_order))
    return ["## Excluded", "", "These modules were not projected, as asked:", "", *modules, ""]


def _copied(adapter: AdapterReport) -> list[str]:
    if not adapter.copied:
        return []
    return [
        "## Copied through",
        "",
        *(f"- {_cell(item['tensor'])}: {item['reason']}" for item in adapter.copied),
        "",
        *(f"**Warning:** {note}." for note in bypass_note(adapter.copied)),
        "",
    ]


def _source(source: dict[str, object]) -> str:
    revision = f" at revision `{source['revision']}`" if source["revision"] else ""
    return _cell(str(source["source"])) + revision


def _cell(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"
