"""The first run's update scaled down: what a weaker fine-tune would have learned, and how far it would have moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safelora_fast.compare.measures.base import OfTheRun, checked
from safelora_fast.compare.measures.drift import measure_drift, rows_of
from safelora_fast.compare.measures.margin import label, model_of

if TYPE_CHECKING:
    from torch import nn

    from safelora_fast.compare.paths import Place
    from safelora_fast.compare.shared_models import Workbench

SCALED = ("lora_B", "lora_embedding_B")


@dataclass(frozen=True)
class WeakenedMeasure(OfTheRun):
    """Losses and divergence at every share of the update."""

    name: str = "scaled"

    def applies(self, place: Place, bench: Workbench) -> bool:
        """The first run, where both learning and divergence are measured."""
        measure = bench.config.measure
        both = measure.narrow is not None and measure.general is not None
        return both and bool(measure.scaled) and place.name == bench.config.runs[0].name and place.seed is not None

    def of(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """The model, the adapter, the rows and the shares."""
        return {**model_of(place, bench), **rows_of(bench), "shares": bench.config.measure.scaled}

    def take(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """By share, what the drift is."""
        return {"shares": {str(share): _at(share, place, bench) for share in sorted(bench.config.measure.scaled)}}


def _at(share: float, place: Place, bench: Workbench) -> dict[str, Any]:
    subject = bench.another(place.adapter)
    weaken(subject.model, share)
    return checked(measure_drift(subject, bench, f"{label(place)}, scaled to {share:g}"))


def weaken(model: nn.Module, share: float) -> None:
    """Scale the update of a LoRA model, in place."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in SCALED for part in name.split(".")):
                parameter.mul_(share)
