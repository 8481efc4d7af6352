"""Adds the defenses to the model cards that PEFT and TRL write into a trainer's output folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.defenses.base import Defense
    from safelora_fast.projection.report import ProjectionReport

CARD = "README.md"
BEGIN, END = "<!-- safelora-fast: defenses -->", "<!-- safelora-fast: end -->"


def write_defenses(folder: str | Path, defenses: Sequence[Defense], report: ProjectionReport | None) -> None:
    """Add a section about the defenses to the model card of a folder, or replace it. Create the card if there is none.

    Args:
        folder: folder of a saved model or adapter.
        defenses: the defenses that are switched on.
        report: report of SafeLora's projection at the end; None if the saved adapter is not projected.
    """
    file = Path(folder, CARD)
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    before, begun, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if begun else ""
    lines = ["## Defenses against emergent misalignment", "", "Trained with `safelora-fast`:", ""]
    section = "\n".join([BEGIN, *lines, *(f"- {defense.card_line(report)}" for defense in defenses), END])
    file.write_text(f"{before.rstrip()}\n\n{section}\n{after.lstrip()}".lstrip(), encoding="utf-8")
