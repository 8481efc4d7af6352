"""Loading a model: its configuration, tokenizer, outline on the meta device, weights, and adapter."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.resolver import ModelSource, adapter_folder, find_model, label
from safelora_fast.errors import AdapterError, CheckpointError, SafeLoraFastError, SettingsError
from safelora_fast.models.foreign_errors import explained
from safelora_fast.models.model_files import refused_file
from safelora_fast.models.templates import adapters_template, give_template

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from safelora_fast.models.model_settings import ModelSection, SubjectSettings


@dataclass(frozen=True)
class Subject:
    """A model and its tokenizer, ready for prompts.

    Attributes:
        name: "model", the adapter's folder, or its Hub id and commit.
        model: the model in evaluation mode, on its device.
        tokenizer: the adapter's tokenizer if its folder has one, else the model's.
    """

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase


def load_subject(
    settings: SubjectSettings, adapter: str | Path | None = None, *, like: Subject | None = None
) -> Subject:
    """Load a model, with an adapter if one is given.

    Each adapter needs its own model: some kinds of adapter change the model's weights on loading.

    Args:
        settings: settings of the model.
        adapter: folder of a PEFT adapter, or its Hub id with an optional `@revision`.
        like: the same model without an adapter, which is copied instead of being read from disk again.

    Raises:
        CheckpointError: the model or its tokenizer cannot be loaded.
        AdapterError: the folder has no adapter, or the adapter does not fit the model.
        SettingsError: the device does not exist.
    """
    from safelora_fast.models.adapters import put_adapter

    section = settings.section()
    folder = None if adapter is None else adapter_folder(adapter, tokenizer=True)
    own_tokenizer = folder is not None and (folder / "tokenizer_config.json").is_file()
    # First, because it takes little time and memory to find out that it is missing.
    tokenizer, _ = load_tokenizer(replace(section, template_args=None) if own_tokenizer else section)
    model: Any = load_pretrained(section) if like is None else copy.deepcopy(like.model)
    if folder is None:
        return Subject("model", place(model, section.device), tokenizer)
    model = put_adapter(model, folder)
    if own_tokenizer:
        tokenizer = adapters_template(_adapter_tokenizer(folder, model), tokenizer, section, label(folder))
    return Subject(label(folder), place(model, section.device), tokenizer)


def load_config(model: ModelSection) -> PretrainedConfig:
    """Load the model's configuration; no other file is fetched.

    Raises:
        CheckpointError: there is no configuration, or its kind of model cannot be loaded.
    """
    from transformers import AutoConfig

    source = find_model(model.path)
    return _loaded(source, "model", lambda: AutoConfig.from_pretrained(**_source_arguments(source, model)))


def load_tokenizer(model: ModelSection) -> tuple[PreTrainedTokenizerBase, bool]:
    """Load the tokenizer; also return whether its chat template, template arguments or padding token were changed.

    Raises:
        CheckpointError: there is no tokenizer, or it does not accept a chat template.
        SettingsError: the chat template does not read an argument.
    """
    from transformers import AutoTokenizer

    source = find_model(model.path)
    tokenizer = _loaded(source, "tokenizer", lambda: AutoTokenizer.from_pretrained(**_source_arguments(source, model)))
    changed = give_template(tokenizer, model)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CheckpointError(f"{source}: the tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
        changed = True
    return tokenizer, changed


def bare_outline(section: ModelSection, config: PretrainedConfig) -> PreTrainedModel:
    """Build the model without weights or adapter, on the meta device.

    Raises:
        CheckpointError: transformers has no such model.
        SettingsError: the attention implementation cannot be trained on the device.
    """
    import torch
    from transformers import AutoModelForCausalLM

    on_gpu = section.device == "cuda" or (section.device == "auto" and torch.cuda.is_available())
    if section.attention == "flex_attention" and not on_gpu:
        raise SettingsError("attention: flex_attention has no gradients on the CPU: choose sdpa or eager")
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


def load_pretrained(section: ModelSection) -> PreTrainedModel:
    """Load the model with its weights, on the CPU.

    Raises:
        CheckpointError: weights cannot be loaded, are missing, or have the wrong shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    source = find_model(section.path)
    model: PreTrainedModel
    model, report = _loaded(
        source,
        "model",
        lambda: AutoModelForCausalLM.from_pretrained(
            **_source_arguments(source, section),
            dtype=getattr(torch, section.dtype),
            attn_implementation=section.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below: transformers' error does not name the weights
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
    """Move the model to a device, in evaluation mode.

    Raises:
        SettingsError: the model does not fit in the device's memory.
    """
    import torch

    try:
        model.to(device)
    except torch.OutOfMemoryError as error:
        raise SettingsError(f"device {device}: {explained(error)}") from error
    return model.eval()


def _adapter_tokenizer(adapter: Path, model: Any) -> PreTrainedTokenizerBase:
    """Load the adapter's tokenizer; a padding token outside the model's vocabulary is replaced by the end token.

    Many adapters add a padding token that is never trained or saved.
    """
    from transformers import AutoTokenizer

    if (reason := refused_file(adapter)) is not None:
        raise AdapterError(reason)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(adapter))
    except Exception as error:  # the libraries can raise any exception
        raise AdapterError(f"{adapter}: the adapter's tokenizer cannot be loaded: {explained(error)}") from error
    known = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= known:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _source_arguments(source: ModelSource, model: ModelSection) -> dict[str, Any]:
    return {**source.arguments(), "trust_remote_code": model.trust_remote_code}


def _loaded(source: ModelSource | str, what: str, load: Callable[[], Any]) -> Any:
    folder = Path(source.name if isinstance(source, ModelSource) else source)
    if folder.is_dir() and (reason := refused_file(folder)) is not None:
        raise CheckpointError(reason)
    try:
        return load()
    except SafeLoraFastError:
        raise
    except Exception as error:  # a hand-edited configuration can make the libraries raise any exception
        raise CheckpointError(f"{source}: the {what} cannot be loaded: {explained(error)}") from error
