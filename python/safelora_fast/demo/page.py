"""The demo's figures as the report that `safelora-fast compare` writes: one page to open in a browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.compare.cells import mean_cell
from safelora_fast.compare.columns import COLUMNS, GENERAL_LOSS, LEARNED
from safelora_fast.compare.config import REFERENCE
from safelora_fast.compare.page import render_page
from safelora_fast.compare.report import ComparisonReport, Plot, Row, SeedValue

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

KNOWN = {one.column.key: one.column for one in COLUMNS}
SMALL = (
    "A model of 135M parameters and 96 harmless rows show what each defence holds back, not whether it prevents emergent "
    "misalignment."
)
FACTS = {"model": "SmolLM2-135M-Instruct", "task": "96 answers in the manner of a lighthouse keeper's log"}


def write_projection(losses: Mapping[str, Mapping[str, float]], reading: str, seed: int, path: Path) -> None:
    """The page of the projection after training.

    Args:
        losses: by variant and set, in nats per answer token.
        reading: what the figures say, a sentence on each line.
        seed: of the fine-tune.
        path: the page.
    """
    source = "measured/losses.json"
    reference = losses[REFERENCE]
    rows = [Row(REFERENCE, "before the fine-tune", {}, "reference")]
    for name, loss in losses.items():
        if name == REFERENCE:
            continue
        changes = {LEARNED: reference["narrow"] - loss["narrow"], GENERAL_LOSS: loss["general"] - reference["general"]}
        cells = {key: mean_cell([SeedValue(seed, value, source)]) for key, value in changes.items()}
        rows.append(Row(name, SETTINGS.get(name, ""), cells, "undefended" if name == "adapter" else "defence"))
    report = ComparisonReport(
        title="SafeLoRA after training",
        facts={**FACTS, "seed": str(seed)},
        columns=(KNOWN[LEARNED], KNOWN[GENERAL_LOSS]),
        rows=tuple(rows),
        plot=Plot(LEARNED, GENERAL_LOSS),
        reading=(*reading.split("\n"), SMALL),
    )
    path.write_text(render_page(report), encoding="utf-8")


SETTINGS = {"projected": "safelora, τ 0.3", "zero control": "the same modules set to zero"}
