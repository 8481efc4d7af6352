"""The model of a recipe with a new adapter: its shape alone, or with its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.resolver import name_and_revision
from safelora_fast.models.foreign_errors import explained
from safelora_fast.models.load import bare_outline, load_pretrained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import LoraConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

    from safelora_fast.recipe.recipe import Recipe


def outline(recipe: Recipe, config: PretrainedConfig) -> PeftModel:
    """The adapted model on the meta device: every module and shape, no weight.

    Raises:
        CheckpointError: there is no such model of transformers.
        SettingsError: the adapter does not fit it.
    """
    import torch

    model = bare_outline(recipe.model, config)
    with torch.device("meta"):
        lora = lora_config(recipe)
        start, lora.init_lora_weights = lora.init_lora_weights, True
        adapted = adapt(recipe, model, lora)
    lora.init_lora_weights = start
    return adapted


def give_adapter(model: PeftModel) -> None:
    """Put zeros in the place of an adapter on the meta device; the frozen weights stay there."""
    import torch

    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad and parameter.is_meta:
                real = torch.zeros(parameter.shape, dtype=parameter.dtype)
                module.register_parameter(name, torch.nn.Parameter(real))


def load_model(recipe: Recipe) -> PeftModel:
    """The model with its weights and a new adapter, made from the seed.

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


def lora_config(recipe: Recipe) -> LoraConfig:
    """The adapter's configuration.

    Raises:
        SettingsError: LoraConfig refuses it.
    """
    from peft import LoraConfig

    try:
        return LoraConfig(task_type="CAUSAL_LM", revision=name_and_revision(recipe.model.path)[1], **recipe.lora)
    except (ValueError, TypeError, ImportError) as error:
        raise recipe.document.blame("lora", explained(error)) from error


def adapt(recipe: Recipe, model: PreTrainedModel, lora: LoraConfig) -> PeftModel:
    """The model of a recipe with a new adapter.

    Raises:
        SettingsError: the adapter does not fit it.
    """
    from peft import get_peft_model

    try:
        return get_peft_model(model, lora)
    except (ValueError, TypeError, ImportError) as error:
        raise recipe.document.blame("lora", explained(error)) from error


def adapted_names(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Name (in the model without PEFT) and layer of every adapted module."""
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module
