"""The objects that a recipe's `lora:` and `training:` sections stand for: PEFT's LoraConfig and TRL's SFTConfig."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.resolver import name_and_revision
from safelora_fast.configuration.signatures import dataclass_fields
from safelora_fast.models.foreign_errors import explained, first_line
from safelora_fast.recipe.lora_and_trainer_sections import LORA, TRAINING
from safelora_fast.recipe.run_folder import CHECKPOINTS, RunFolder

if TYPE_CHECKING:
    from peft import LoraConfig
    from trl import SFTConfig

    from safelora_fast.recipe.recipe import Recipe


def lora_config(recipe: Recipe) -> LoraConfig:
    """Return the adapter's configuration.

    Raises:
        SettingsError: LoraConfig rejects a value.
    """
    from peft import LoraConfig

    try:
        return LoraConfig(task_type="CAUSAL_LM", revision=name_and_revision(recipe.model.path)[1], **recipe.lora)
    except (ValueError, TypeError, ImportError) as error:
        raise recipe.document.blame(LORA.section, explained(error)) from error


def trainer_arguments(recipe: Recipe) -> SFTConfig:
    """Return the trainer's arguments; the class's defaults apply to everything that the recipe does not set.

    Raises:
        SettingsError: SFTConfig rejects a value. The message names the key if SFTConfig's error reveals it.
    """
    import torch
    from trl import SFTConfig

    section, known = recipe.model, dataclass_fields(TRAINING.package, TRAINING.name)
    if section.device == "cuda" and not torch.cuda.is_available():
        raise recipe.document.problem(("model", "device"), "is cuda, but torch sees no GPU")
    values: dict[str, Any] = {"prediction_loss_only": True, "logging_first_step": True}
    if "bf16" not in recipe.training and "fp16" not in recipe.training:
        values.update(bf16=section.dtype == "bfloat16", fp16=section.dtype == "float16")
    if section.device == "cpu" or not torch.cuda.is_available():
        values.update(dataloader_pin_memory=False, use_cpu=True)
    if recipe.data.eval is not None:
        values["eval_on_start"] = True
    if not recipe.training.get("packing") or recipe.data.safe is not None:  # a mixture is packed earlier, with its tags
        values["dataset_kwargs"] = {"skip_prepare_dataset": True}
    if "activation_checkpointing" not in known:  # older versions default to reentrant, which DDP lacks
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    values |= {name: value for name, value in recipe.training.items() if name != "completion_only_loss"}
    values = {name: value for name, value in values.items() if name in known}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return SFTConfig(output_dir=str(RunFolder(recipe).path / CHECKPOINTS), disable_tqdm=True, **values)
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise recipe.document.blame(TRAINING.section, first_line(error)) from error
