"""Loading a model: its configuration, its tokenizer, its shape without weights, and the model itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.resolver import ModelSource, find_model
from safelora_fast.errors import CheckpointError, SafeLoraFastError, SettingsError
from safelora_fast.models.foreign_errors import explained
from safelora_fast.models.model_files import refused_file
from safelora_fast.models.templates import give_template

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from safelora_fast.models.section import ModelSection


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


def bare_outline(section: ModelSection, config: PretrainedConfig) -> PreTrainedModel:
    """The model without an adapter on the meta device.

    Raises:
        CheckpointError: there is no such model of transformers.
        SettingsError: its attention cannot be trained on the device.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if section.attention == "flex_attention" and not _on_gpu(section.device):
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


def _on_gpu(device: str) -> bool:
    import torch

    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


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
