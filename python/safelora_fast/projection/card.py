"""The model card of a projected adapter."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from safelora_fast.checkpoints.model_card import code, model_card, table
from safelora_fast.checkpoints.module_names import natural_order
from safelora_fast.projection.copied_tensors import bypass_note
from safelora_fast.projection.operators import operator_of
from safelora_fast.projection.report import published

if TYPE_CHECKING:
    from safelora_fast.projection.report import AdapterReport, ModuleReport, ProjectionReport


def render(report: ProjectionReport, index: int) -> str:
    """Return the card of one adapter as Markdown with the front matter for the Hub."""
    report = published(report)
    adapter = report.adapters[index]
    settings = report.settings
    operator = operator_of(settings)
    body = [
        f"{len(adapter.projected)} of {len(adapter.modules)} adapted modules were projected with `safelora-fast`; "
        "the others and all other tensors are unchanged.",
        "",
        *table(
            {
                "input adapter": code(adapter.adapter),
                "aligned model": _source(report.aligned),
                "base model": _source(report.base),
                "operator": f"{operator.title(settings)}: B ← {operator.formula}",
                "selection": report.selection,
                "median ‖V‖/‖W_aligned‖": _number(adapter.v_ratio),
                "safelora-fast": report.versions["safelora-fast"],
            }
        ),
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
    ]
    title = "LoRA adapter, projected onto the alignment subspace"
    return model_card(title, body, model=report.aligned["source"], also=adapter.trained_on)


def _row(module: ModuleReport) -> str:
    done = "yes" if module.projected else f"no: {module.reason}"
    metrics = (module.gain, module.b_norm, module.b_norm_after, module.v_norm)
    cosine, *others = (_number(value) for value in (module.cosine, *metrics))
    return f"| {code(module.name)} | {cosine} | {done} | {' | '.join(others)} |"


def _excluded(adapter: AdapterReport) -> list[str]:
    if not adapter.excluded:
        return []
    modules = (f"- {code(name)}" for name in sorted(adapter.excluded, key=natural_order))
    return ["## Excluded", "", "These modules were not projected, as asked:", "", *modules, ""]


def _copied(adapter: AdapterReport) -> list[str]:
    if not adapter.copied:
        return []
    return [
        "## Copied through",
        "",
        *(f"- {code(item['tensor'])}: {item['reason']}" for item in adapter.copied),
        "",
        *(f"**Warning:** {note}." for note in bypass_note(adapter.copied)),
        "",
    ]


def _source(source: dict[str, object]) -> str:
    revision = f" at revision `{source['revision']}`" if source["revision"] else ""
    return code(str(source["source"])) + revision


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"
