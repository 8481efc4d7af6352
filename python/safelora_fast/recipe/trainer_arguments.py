"""TRL's SFTConfig from a recipe."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.models.foreign_errors import first_line
from safelora_fast.recipe.lora_and_trainer_sections import TRAINING
from safelora_fast.recipe.signatures import dataclass_fields

if TYPE_CHECKING:
    from trl import SFTConfig

    from safelora_fast.errors import SettingsError
    from safelora_fast.recipe.recipe import Recipe

CHECKPOINTS = "checkpoints"


def trainer_arguments(recipe: Recipe) -> SFTConfig:
    """The trainer's arguments; what the recipe leaves open is the class's default.

    Raises:
        SettingsError: SFTConfig refuses a value; the key is named where its words tell it.
    """
    import torch
    from trl import SFTConfig

    section = recipe.model
    if section.device == "cuda" and not torch.cuda.is_available():
        raise recipe.document.problem(("model", "device"), "is cuda, but torch sees no GPU")
    on_cpu = section.device == "cpu" or not torch.cuda.is_available()
    values = {name: value for name, value in recipe.training.items() if name != "completion_only_loss"}
    automatic: dict[str, Any] = {"prediction_loss_only": True, "logging_first_step": True}
    if "bf16" not in values and "fp16" not in values:
        automatic.update(bf16=section.dtype == "bfloat16", fp16=section.dtype == "float16")
    if on_cpu:
        automatic["dataloader_pin_memory"] = False
    if recipe.data.eval is not None:
        automatic["eval_on_start"] = True
    if not values.get("packing") or recipe.data.safe is not None:  # a mixture is packed before, with its tags
        automatic["dataset_kwargs"] = {"skip_prepare_dataset": True}
    known = dataclass_fields(TRAINING.package, TRAINING.name)
    if "activation_checkpointing" not in known:  # older versions choose the reentrant kind, which DDP does not bear
        automatic["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    values = {**automatic, **values}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return SFTConfig(
                output_dir=str(Path(recipe.output.folder) / CHECKPOINTS),
                disable_tqdm=True,
                **{name: value for name, value in values.items() if name in known},
                **({"use_cpu": True} if on_cpu else {}),
            )
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise refused(recipe, error) from error


def refused(recipe: Recipe, error: Exception) -> SettingsError:
    """The error for what the trainer refuses; it names the key when its words begin with the value, or speak of no other key."""
    return recipe.document.blame(TRAINING.section, first_line(error))
