"""Which model is meant, and how it is loaded: the `model:` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class ModelSection:
    """What is fine-tuned.

    Attributes:
        path: a folder, or a Hub id with an optional `@revision`; a folder that exists wins.
        dtype: of the frozen weights; the adapter is always float32.
        device: "auto" is the GPU where there is one. Which GPU: CUDA_VISIBLE_DEVICES.
        attention: the implementation, as transformers calls it ("sdpa", "eager", "flash_attention_2").
        chat_template: a Jinja file in the place of the tokenizer's own template.
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
