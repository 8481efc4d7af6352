"""The defenses in the model cards that PEFT and TRL write into a trainer's folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safelora_fast.defenses.safelora import SafeLora

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.defenses.base import Defense
    from safelora_fast.projection.report import ProjectionReport

CARD = "README.md"
BEGIN, END = "<!-- safelora-fast: defenses -->", "<!-- safelora-fast: end -->"


def write_defenses(folder: str | Path, defenses: Sequence[Defense], report: ProjectionReport | None) -> None:
    """Add the defenses to the card of a folder, or replace what was said of them; a folder without a card gets one.

    Args:
        folder: where a model or an adapter was saved.
        defenses: those that are switched on.
        report: of SafeLora's projection at the end; None while what is saved is not projected.
    """
    file = Path(folder, CARD)
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    before, begun, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if begun else ""
    section = "\n".join([BEGIN, *_section(defenses, report), END])
    file.write_text(f"{before.rstrip()}\n\n{section}\n{after.lstrip()}".lstrip(), encoding="utf-8")


def _section(defenses: Sequence[Defense], report: ProjectionReport | None) -> list[str]:
    at_end = [isinstance(defense, SafeLora) and defense.at == "end" for defense in defenses]
    return [
        "## Defenses against emergent misalignment",
        "",
        "Trained with `safelora-fast`:",
        "",
        *(f"- `{given!r}`{_projected(report) if last else ''}" for given, last in zip(defenses, at_end, strict=True)),
    ]


def _projected(report: ProjectionReport | None) -> str:
    if report is None:
        return ": **not projected yet**. It acts when training ends; this is the adapter as it was trained"
    (adapter,) = report.adapters
    return f": {len(adapter.projected)} of {len(adapter.modules)} adapted modules were projected when training ended"
