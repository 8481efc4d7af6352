"""The model of a recipe: its configuration, its tokenizer, its shape without weights, and the model itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.resolver import ModelSource, find_model, name_and_revision
from safelora_fast.errors import CheckpointError, SafeLoraFastError, SettingsError
from safelora_fast.models.foreign_errors import explained
from safelora_fast.models.model_files import refused_file
from safelora_fast.models.templates import give_template

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from peft import LoraConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from safelora_fast.recipe.recipe import Recipe
    from safelora_fast.recipe.sections import ModelSection


def load_config(model: ModelSection) -> PretrainedConfig:
    """The model's configuration; nothing else is fetched.

    Raises:
        CheckpointError: there is none, or it is of a model that cannot be loaded.
    """
    from transformers import AutoConfig

    source = find_model(model.path)
    return _loaded(source, "model", lambda: AutoConfig.from_pretrained(**_where(source, model)))


def load_tokenizer(model: ModelSection) -> tuple[PreTrainedTokenizerBase, bool]:
    """The tokenizer, and whether it was changed: a chat template or its arguments, or a padding token where there was none.

    Raises:
        CheckpointError: there is none, or no chat template where the recipe names a file.
        SettingsError: the chat template does not read an argument.
    """
    from transformers import AutoTokenizer

    source = find_model(model.path)
    tokenizer = _loaded(source, "tokenizer", lambda: AutoTokenizer.from_pretrained(**_where(source, model)))
    changed = give_template(tokenizer, model)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CheckpointError(f"{source}: the tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
        changed = True
    return tokenizer, changed


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


def bare_outline(section: ModelSection, config: PretrainedConfig) -> PreTrainedModel:
    """The model without an adapter on the meta device.

    Raises:
        CheckpointError: there is no such model of transformers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = _loaded(
            section.path,
            "model",
            lambda: AutoModelForCausalLM.from_config(
                config,
                dtype=getattr(torch, section.dtype),
                trust_remote_code=section.trust_remote_code,
                attn_implementation=section.attention,
            ),
        )
    return model


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


def load_pretrained(section: ModelSection) -> PreTrainedModel:
    """The model with its weights, on the CPU.

    Raises:
        CheckpointError: the weights cannot be loaded, or some are missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    source = find_model(section.path)
    model: PreTrainedModel
    model, report = _loaded(
        source,
        "model",
        lambda: AutoModelForCausalLM.from_pretrained(
            **_where(source, section),
            dtype=getattr(torch, section.dtype),
            attn_implementation=section.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name: transformers' own words do not tell
        ),
    )
    missing, mismatched = sorted(report["missing_keys"]), sorted(report["mismatched_keys"], key=str)
    if mismatched:
        name, there, wanted = mismatched[0]
        raise CheckpointError(
            f"{source}: {name} is {list(there)} in the checkpoint, but {list(wanted)} by its config.json ({len(mismatched)} "
            "weights differ): they are not of one model"
        )
    if missing:
        raise CheckpointError(f"{source}: the checkpoint lacks {len(missing)} weights, e.g. {missing[0]}")
    return model


def place(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The model on a device, in evaluation mode.

    Raises:
        SettingsError: it does not fit there.
    """
    import torch

    try:
        model.to(device)
    except torch.OutOfMemoryError as error:
        raise SettingsError(f"device {device}: {explained(error)}") from error
    return model.eval()


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


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[0]) if lines else type(error).__name__


def _where(source: ModelSource, model: ModelSection) -> dict[str, Any]:
    return {**source.arguments(), "trust_remote_code": model.trust_remote_code}


def _loaded(source: ModelSource | str, what: str, load: Callable[[], Any]) -> Any:
    folder = Path(source.name if isinstance(source, ModelSource) else source)
    if folder.is_dir() and (reason := refused_file(folder)) is not None:
        raise CheckpointError(reason)
    try:
        return load()
    except SafeLoraFastError:
        raise
    except Exception as error:  # a configuration that was edited by hand makes libraries raise what they run into
        raise CheckpointError(f"{source}: the {what} cannot be loaded: {explained(error)}") from error
