"""Settings of a model: which one, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from safelora_fast.errors import SettingsError

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class ModelSection:
    """The model to fine-tune: the `model:` section of a recipe.

    Attributes:
        path: a folder, or a Hub id with an optional `@revision`; an existing folder takes precedence.
        dtype: dtype of the frozen weights; the adapter is always float32.
        device: "auto" uses a GPU if there is one. CUDA_VISIBLE_DEVICES selects the GPU.
        attention: transformers' name of the implementation ("sdpa", "eager", "flash_attention_2").
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
        dtype: "auto" is float32 on the CPU and bfloat16 on a GPU.
        device: "auto" uses a GPU if there is one.
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
        """Return the settings with "auto" replaced by this machine's device and dtype.

        Raises:
            SettingsError: the device is "cuda" and torch sees no GPU.
        """
        device = chosen_device(self.device)
        automatic = "float32" if device == "cpu" else "bfloat16"
        return replace(self, device=device, dtype=automatic if self.dtype == "auto" else self.dtype)

    def section(self) -> ModelSection:
        """Return the same settings as a recipe's `model:` section."""
        chosen = self.resolved()
        return ModelSection(
            chosen.model,
            dtype=chosen.dtype,  # type: ignore[arg-type]
            device=chosen.device,  # type: ignore[arg-type]
            chat_template=chosen.chat_template,
            trust_remote_code=chosen.trust_remote_code,
            template_args=chosen.template_args,
        )


def chosen_device(device: str) -> str:
    """Return the device for a setting; "auto" is "cuda" if torch sees a GPU, else "cpu".

    Raises:
        SettingsError: the device is "cuda" and torch sees no GPU.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device is cuda, but torch sees no GPU")
    return device
