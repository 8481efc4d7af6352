"""The model that is evaluated: its weights, the adapter on it, and the tokenizer that belongs to both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from safelora_fast.checkpoints.resolver import adapter_folder, label
from safelora_fast.errors import AdapterError, SettingsError
from safelora_fast.models.adapter_loading import put_adapter
from safelora_fast.models.foreign_errors import explained
from safelora_fast.models.load import load_pretrained, load_tokenizer, place
from safelora_fast.models.model_files import refused_file
from safelora_fast.models.section import ModelSection
from safelora_fast.models.templates import adapters_template

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

Device = Literal["auto", "cpu", "cuda"]
DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Subject:
    """A model and its tokenizer, ready to be asked.

    Attributes:
        name: "model", or the adapter's folder, or its Hub id and commit.
        model: in evaluation mode, on its device.
        tokenizer: the adapter's where its folder has one.
    """

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class SubjectSettings:
    """How a model is loaded to be evaluated.

    Attributes:
        model: a folder, or a Hub id with an optional `@revision`.
        dtype: "auto" is float32 on the CPU, bfloat16 on a GPU.
        device: "auto" is the GPU where there is one.
        chat_template: a Jinja file in the place of the tokenizer's own template.
        trust_remote_code: run Python code that comes with the model.
        template_args: values of variables that the template reads, e.g. `{"enable_thinking": False}`.
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
        """With the device and dtype that "auto" stands for here.

        Raises:
            SettingsError: "cuda" is asked for and torch sees no GPU.
        """
        import torch

        there = torch.cuda.is_available()
        if self.device == "cuda" and not there:
            raise SettingsError("device is cuda, but torch sees no GPU")
        device = ("cuda" if there else "cpu") if self.device == "auto" else self.device
        automatic = "float32" if device == "cpu" else "bfloat16"
        return replace(self, device=device, dtype=automatic if self.dtype == "auto" else self.dtype)


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
    chosen = settings.resolved()
    section = ModelSection(
        chosen.model,
        dtype=chosen.dtype,  # type: ignore[arg-type]
        chat_template=chosen.chat_template,
        trust_remote_code=chosen.trust_remote_code,
        template_args=chosen.template_args,
    )
    folder = None if adapter is None else adapter_folder(adapter, tokenizer=True)
    model: Any = load_pretrained(section)
    dressed = folder is not None and (folder / "tokenizer_config.json").is_file()
    tokenizer, _ = load_tokenizer(replace(section, template_args=None) if dressed else section)
    if folder is not None:
        model = put_adapter(model, folder)
        if dressed:
            tokenizer = adapters_template(_tokenizer_of(folder, model), tokenizer, section, label(folder))
    return Subject("model" if folder is None else label(folder), place(model, chosen.device), tokenizer)


def _tokenizer_of(adapter: Path, model: Any) -> PreTrainedTokenizerBase:
    """The adapter's own tokenizer, with a padding token that the model has: many add one that is never trained or saved."""
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
