"""The misalignment margin of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.compare.measures.base import OfTheRun
from safelora_fast.data.pairs import builtin_pairs
from safelora_fast.files.digest import text_digest
from safelora_fast.recipe.model_stamp import subject_stamp
from safelora_fast.scoring.margin import answer_margin

if TYPE_CHECKING:
    from safelora_fast.compare.paths import Place
    from safelora_fast.compare.shared_models import Workbench


@dataclass(frozen=True)
class MarginMeasure(OfTheRun):
    """See :func:`safelora_fast.scoring.margin.answer_margin`."""

    name: str = "margin"

    def applies(self, _place: Place, bench: Workbench) -> bool:
        """Every run, where the configuration asks for it."""
        return bench.config.measure.margin

    def of(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """The model, the adapter and the pairs."""
        pairs = text_digest([asdict(pair) for pair in builtin_pairs()])
        return {**model_of(place, bench), "pairs_sha256": pairs, "strings": bench.strings}

    def take(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """The report of the margin."""
        subject = bench.subject(place.adapter)
        advance = bench.counting(f"margin of {label(place)}", 2 * len(builtin_pairs()))
        report = answer_margin(subject.model, subject.tokenizer, strings=bench.strings, progress=advance)
        return report.to_dict()


def model_of(place: Place, bench: Workbench) -> dict[str, Any]:
    """What every measurement depends on: the model as it is loaded, and the adapter."""
    settings = bench.settings
    return {
        "model": settings.model,
        "dtype": settings.dtype,
        "device": settings.device,
        "chat_template": settings.chat_template,
        "template_args": settings.template_args,
        **subject_stamp(settings.model, place.adapter, settings.chat_template),
    }


def label(place: Place) -> str:
    """A run in words."""
    return place.name if place.seed is None else f"{place.name}, seed {place.seed}"
