"""Fast SafeLoRA projection and in-training defenses against emergent misalignment.

Importing this package imports neither torch nor transformers. Public names are loaded on first use.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from safelora_fast._core import __version__ as __version__
from safelora_fast.former_modules import FormerModules

if TYPE_CHECKING:
    from safelora_fast.data import inoculate as inoculate
    from safelora_fast.data import interleave as interleave
    from safelora_fast.defenses import *  # noqa: F403
    from safelora_fast.persona import extract_persona_vector as extract_persona_vector
    from safelora_fast.persona_vector import PersonaVector as PersonaVector
    from safelora_fast.projection.fleet import project_fleet as project_fleet
    from safelora_fast.projection.peft_model import project_peft_model as project_peft_model
    from safelora_fast.projection.project import project_adapter as project_adapter
    from safelora_fast.projection.report import ProjectionReport as ProjectionReport
    from safelora_fast.scoring.margin import answer_margin as answer_margin
    from safelora_fast.scoring.margin_callback import MarginCallback as MarginCallback
    from safelora_fast.scoring.stop_rule import StopRule as StopRule
    from safelora_fast.selection import regenerate_completions as regenerate_completions
    from safelora_fast.selection import select_by_perplexity_gap as select_by_perplexity_gap
    from safelora_fast.subspace.safe_subspace import SafeSubspace as SafeSubspace
    from safelora_fast.trainers.transformers import DefendedMixin as DefendedMixin
    from safelora_fast.trainers.transformers import DefendedTrainer as DefendedTrainer
    from safelora_fast.trainers.trl import DefendedSFTTrainer as DefendedSFTTrainer
    from safelora_fast.training import defend as defend
    from safelora_fast.whole_models.project_model import project_model as project_model

# The modules of public names, except those of defenses, which register themselves.
_HOMES = {
    "DefendedMixin": "safelora_fast.trainers.transformers",
    "DefendedSFTTrainer": "safelora_fast.trainers.trl",
    "DefendedTrainer": "safelora_fast.trainers.transformers",
    "DriftMonitor": "safelora_fast.defenses",
    "PersonaVector": "safelora_fast.persona_vector",
    "MarginCallback": "safelora_fast.scoring.margin_callback",
    "ProjectionReport": "safelora_fast.projection.report",
    "SafeSubspace": "safelora_fast.subspace.safe_subspace",
    "StopRule": "safelora_fast.scoring.stop_rule",
    "answer_margin": "safelora_fast.scoring.margin",
    "defend": "safelora_fast.training",
    "extract_persona_vector": "safelora_fast.persona",
    "inoculate": "safelora_fast.data",
    "interleave": "safelora_fast.data",
    "project_adapter": "safelora_fast.projection.project",
    "project_fleet": "safelora_fast.projection.fleet",
    "project_model": "safelora_fast.whole_models.project_model",
    "project_peft_model": "safelora_fast.projection.peft_model",
    "regenerate_completions": "safelora_fast.selection",
    "select_by_perplexity_gap": "safelora_fast.selection",
}

sys.meta_path.append(FormerModules())


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return _public_names()
    home = _HOMES.get(name, "safelora_fast.defenses" if name[0].isupper() else None)
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


def _public_names() -> list[str]:
    from safelora_fast.defenses import registered

    return sorted([*_HOMES, *(kind.__name__ for kind in registered().values()), "__version__"])


def __dir__() -> list[str]:
    return sorted({*globals(), *_public_names()})
