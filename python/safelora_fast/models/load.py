"""Loading a model: which one is meant, its configuration, tokenizer, shape without weights, weights, and an adapter on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safelora_fast.checkpoints.resolver import ModelSource, adapter_folder, find_model, label
from safelora_fast.errors import AdapterError, CheckpointError, SafeLoraFastError, SettingsError
from safelora_fast.models.foreign_errors import explained
from safelora_fast.models.model_files import refused_file
from safelora_fast.models.templates import adapters_template, give_template

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class ModelSection:
    """The model to fine-tune: the `model:` section of a recipe.

    Attributes:
        path: a folder, or a Hub id with an optional `@revision`; a folder that exists wins.
        dtype: of the frozen weights; the adapter is always float32.
        device: "auto" is the GPU where there is one. Which GPU: CUDA_VISIBLE_DEVICES.
        attention: the implementation, as transformers calls it ("sdpa", "eager", "flash_attention_2").
        chat_template: a Jinja file that replaces the tokenizer's own template.
        template_args: values of variables that the template reads, e.g. `{enable_thinking: false}`.
        trust_remote_code: run Python code that comes with the model.
    """

    path: str
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    template_args: dict[str, Any] | None = None


@dataclass(frozen=True)
class SubjectSettings:
    """The model to evaluate; the field names are keys of stored evaluations.

    Attributes:
        model: a folder, or a Hub id with an optional `@revision`.
        dtype: "auto" is float32 on the CPU, bfloat16 on a GPU.
        device: "auto" is the GPU where there is one.
        chat_template: a Jinja file that replaces the tokenizer's own template.
        trust_remote_code: run Python code that comes with the model.
        template_args: values of variables that the template reads, e.g. `{"enable_thinking": False}`.

    Raises:
        SettingsError: an unknown dtype or device.
    """

    model: str
    dtype: str = "auto"
    device: str = "auto"
    chat_template: str | None = None
    trust_remote_code: bool = False
    template_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("dtype", self.dtype, DTYPES), ("device", self.device, DEVICES)):
            if value not in known:
                raise SettingsError(f"{name} is {value!r}, it must be one of {', '.join(known)}")

    def resolved(self) -> SubjectSettings:
        """With the device and dtype that "auto" stands for on this machine.

        Raises:
            SettingsError: "cuda" is asked for and torch sees no GPU.
        """
        device = chosen_device(self.device)
        automatic = "float32" if device == "cpu" else "bfloat16"
        return replace(self, device=device, dtype=automatic if self.dtype == "auto" else self.dtype)

    def section(self) -> ModelSection:
        """The same settings as a recipe has them."""
        chosen = self.resolved()
        return ModelSection(
            chosen.model,
            dtype=chosen.dtype,  # type: ignore[arg-type]
            device=chosen.device,  # type: ignore[arg-type]
            chat_template=chosen.chat_template,
            trust_remote_code=chosen.trust_remote_code,
            template_args=chosen.template_args,
        )


@dataclass(frozen=True)
class Subject:
    """A model and its tokenizer, ready for prompts.

    Attributes:
        name: "model", or the adapter's folder, or its Hub id and commit.
        model: in evaluation mode, on its device.
        tokenizer: the adapter's where its folder has one.
    """

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase


def chosen_device(device: str) -> str:
    """The device that "auto" stands for: "cuda" where torch sees a GPU, else "cpu".

    Raises:
        SettingsError: "cuda" is asked for and torch sees no GPU.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device is cuda, but torch sees no GPU")
    return device


def load_subject(settings: SubjectSettings, adapter: str | Path | None = None) -> Subject:
    """Load a model, with an adapter on it where one is given.

    Each adapter gets a model of its own: some kinds of adapter change the model's weights when they are loaded.

    Args:
        settings: how the model is loaded.
        adapter: folder of a PEFT adapter, or its Hub id with an optional `@revision`.

    Raises:
        CheckpointError: the model or its tokenizer cannot be loaded.
        AdapterError: the folder holds no adapter, or one that does not fit the model.
        SettingsError: the device does not exist.
    """
    from safelora_fast.models.adapters import put_adapter

    section = settings.section()
    folder = None if adapter is None else adapter_folder(adapter, tokenizer=True)
    model: Any = load_pretrained(section)
    own_tokenizer = folder is not None and (folder / "tokenizer_config.json").is_file()
    tokenizer, _ = load_tokenizer(replace(section, template_args=None) if own_tokenizer else section)
    if folder is None:
        return Subject("model", place(model, section.device), tokenizer)
    model = put_adapter(model, folder)
    if own_tokenizer:
        tokenizer = adapters_template(_adapter_tokenizer(folder, model), tokenizer, section, label(folder))
    return Subject(label(folder), place(model, section.device), tokenizer)


def load_config(model: ModelSection) -> PretrainedConfig:
    """The model's configuration; nothing else is fetched.

    Raises:
        CheckpointError: there is none, or it is of a model that cannot be loaded.
    """
    from transformers import AutoConfig

    source = find_model(model.path)
    return _loaded(source, "model", lambda: AutoConfig.from_pretrained(**_source_arguments(source, model)))


def load_tokenizer(model: ModelSection) -> tuple[PreTrainedTokenizerBase, bool]:
    """The tokenizer, and whether it was changed: a chat template or its arguments, or a padding token where it had none.

    Raises:
        CheckpointError: there is none, or it takes no chat template.
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
    """The model without an adapter on the meta device.

    Raises:
        CheckpointError: transformers has no such model.
        SettingsError: its attention cannot be trained on the device.
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
            **_source_arguments(source, section),
            dtype=getattr(torch, section.dtype),
            attn_implementation=section.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name: transformers does not name them
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


def _adapter_tokenizer(adapter: Path, model: Any) -> PreTrainedTokenizerBase:
    """The adapter's tokenizer, with a padding token that the model has: many add one that is never trained or saved."""
    from transformers import AutoTokenizer

    if (reason := refused_file(adapter)) is not None:
        raise AdapterError(reason)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(adapter))
    except Exception as error:  # whatever the libraries run into
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
    except Exception as error:  # a configuration edited by hand makes libraries raise anything
        raise CheckpointError(f"{source}: the {what} cannot be loaded: {explained(error)}") from error
