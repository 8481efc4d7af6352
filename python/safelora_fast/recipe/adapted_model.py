"""A recipe's model with a new LoRA adapter, either on the meta device or with its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.models.foreign_errors import explained
from safelora_fast.models.load import bare_outline, load_pretrained
from safelora_fast.recipe.lora_and_trainer_arguments import lora_config
from safelora_fast.recipe.lora_and_trainer_sections import LORA

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

    from safelora_fast.recipe.recipe import Recipe


def outline(recipe: Recipe, config: PretrainedConfig) -> PeftModel:
    """Build the adapted model on the meta device: all modules and shapes, without weights.

    Raises:
        CheckpointError: transformers has no such model.
        SettingsError: the adapter does not fit the model.
    """
    import torch

    model = bare_outline(recipe.model, config)
    with torch.device("meta"):
        lora = lora_config(recipe)
        start, lora.init_lora_weights = lora.init_lora_weights, True
        adapted = adapt(recipe, model, lora)
    lora.init_lora_weights = start
    return adapted


def load_model(recipe: Recipe) -> PeftModel:
    """Load the model's weights and add a new adapter, initialized from the recipe's seed.

    Raises:
        CheckpointError: the weights cannot be loaded, or some are missing.
        SettingsError: the adapter does not fit the model.
    """
    from transformers import set_seed

    from safelora_fast.models.token_types import give_token_types

    model = load_pretrained(recipe.model)
    give_token_types(model)
    model.config.use_cache = False
    set_seed(recipe.training["seed"])
    return adapt(recipe, model, lora_config(recipe))


def adapt(recipe: Recipe, model: PreTrainedModel, lora: LoraConfig) -> PeftModel:
    """Add a new adapter to a recipe's model.

    Raises:
        SettingsError: the adapter does not fit the model.
    """
    from peft import get_peft_model

    try:
        return get_peft_model(model, lora)
    except (ValueError, TypeError, ImportError) as error:
        raise recipe.document.blame(LORA.section, explained(error)) from error
