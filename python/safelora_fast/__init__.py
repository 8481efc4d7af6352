"""Fast SafeLoRA projection and in-training defences against emergent misalignment.

Importing this package imports neither torch nor transformers; public names are loaded when first used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from safelora_fast._core import __version__
from safelora_fast.former_modules import FormerModules

if TYPE_CHECKING:
    from safelora_fast.data import inoculate, interleave
    from safelora_fast.defenses import KL, DriftMonitor, FeatureDistance, SafeLora, Steering, SubspacePenalty
    from safelora_fast.persona import extract_persona_vector
    from safelora_fast.persona_vector import PersonaVector
    from safelora_fast.projection.peft_model import project_peft_model
    from safelora_fast.projection.project import project_adapter
    from safelora_fast.projection.report import ProjectionReport
    from safelora_fast.scoring.margin import answer_margin
    from safelora_fast.scoring.margin_callback import MarginCallback
    from safelora_fast.selection import select_by_perplexity_gap
    from safelora_fast.subspace.safe_subspace import SafeSubspace
    from safelora_fast.trainers.transformers import DefendedMixin, DefendedTrainer
    from safelora_fast.trainers.trl import DefendedSFTTrainer
    from safelora_fast.training import defend

_HOMES = {
    "KL": "safelora_fast.defenses",
    "DefendedMixin": "safelora_fast.trainers.transformers",
    "DefendedSFTTrainer": "safelora_fast.trainers.trl",
    "DefendedTrainer": "safelora_fast.trainers.transformers",
    "DriftMonitor": "safelora_fast.defenses",
    "FeatureDistance": "safelora_fast.defenses",
    "PersonaVector": "safelora_fast.persona_vector",
    "MarginCallback": "safelora_fast.scoring.margin_callback",
    "ProjectionReport": "safelora_fast.projection.report",
    "SafeLora": "safelora_fast.defenses",
    "SafeSubspace": "safelora_fast.subspace.safe_subspace",
    "Steering": "safelora_fast.defenses",
    "SubspacePenalty": "safelora_fast.defenses",
    "answer_margin": "safelora_fast.scoring.margin",
    "defend": "safelora_fast.training",
    "extract_persona_vector": "safelora_fast.persona",
    "inoculate": "safelora_fast.data",
    "interleave": "safelora_fast.data",
    "project_adapter": "safelora_fast.projection.project",
    "project_peft_model": "safelora_fast.projection.peft_model",
    "select_by_perplexity_gap": "safelora_fast.selection",
}

__all__ = [
    "KL",
    "DefendedMixin",
    "DefendedSFTTrainer",
    "DefendedTrainer",
    "DriftMonitor",
    "FeatureDistance",
    "MarginCallback",
    "PersonaVector",
    "ProjectionReport",
    "SafeLora",
    "SafeSubspace",
    "Steering",
    "SubspacePenalty",
    "__version__",
    "answer_margin",
    "defend",
    "extract_persona_vector",
    "inoculate",
    "interleave",
    "project_adapter",
    "project_peft_model",
    "select_by_perplexity_gap",
]


sys.meta_path.append(FormerModules())


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        if error.name not in {"torch", "transformers", "peft", "yaml", "trl", "accelerate", "datasets"}:
            raise
        from safelora_fast.errors import MissingDependencyError, how_to_install

        message = f"{name} needs {error.name}: {how_to_install('train')}"
        raise MissingDependencyError(message) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
