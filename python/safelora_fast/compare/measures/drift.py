"""What a run learned of the narrow task, and how far it moved on general answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.compare.measures.base import OfTheRun
from safelora_fast.compare.measures.margin import label, model_of
from safelora_fast.scoring.drift import answer_drift

if TYPE_CHECKING:
    from safelora_fast.compare.paths import Place
    from safelora_fast.compare.shared_models import Workbench
    from safelora_fast.models.load import Subject


@dataclass(frozen=True)
class DriftMeasure(OfTheRun):
    """Losses of held-out narrow and of general answers, and on the latter the divergence from the reference."""

    name: str = "drift"

    def applies(self, _place: Place, bench: Workbench) -> bool:
        """Every run, where the configuration names rows."""
        return bench.config.measure.drift

    def of(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """The model, the adapter and the rows."""
        return {**model_of(place, bench), **rows_of(bench)}

    def take(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """Tokens, loss and divergence of every answer, by the name of its set."""
        return measure_drift(bench.subject(place.adapter), bench, label(place))


def rows_of(bench: Workbench) -> dict[str, Any]:
    """The rows that losses are measured on."""
    return {
        "strings": bench.strings,
        "rows": {name: {"sha256": rows.sha256, "count": len(rows.rows)} for name, rows in bench.rows.items()},
    }


def measure_drift(subject: Subject, bench: Workbench, of: str) -> dict[str, Any]:
    """Tokens, loss and divergence of every answer, by the name of its set.

    Raises:
        SafeLoraFastError: a row does not fit the chat template, or memory does not suffice.
    """
    found = {}
    for name in bench.rows:
        examples = bench.examples(name, subject)
        reference = bench.reference.model if name == "general" and subject is not bench.reference else None
        advance = bench.counting(f"{name} answers of {of}", len(examples))
        answers = answer_drift(subject.model, reference, examples, progress=advance)
        found[name] = [asdict(answer) for answer in answers]
    return found
