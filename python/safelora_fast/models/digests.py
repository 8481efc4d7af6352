"""SHA-256 digests of a loaded model, a tokenizer and its chat template."""

from __future__ import annotations

import datetime
import hashlib
import json
from typing import TYPE_CHECKING, Any

from safelora_fast.data.chat import chat_of
from safelora_fast.errors import DataError
from safelora_fast.files.digest import text_digest

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

VALUES = 1 << 24
PROBE = "A probe of 12 words:\n\n  déjà vu — “naïve” 日本語 🙂 <b>x</b>, don't, tab\there. "
UNIMPORTANT = {"_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype"}  # in a configuration


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a loaded model's configuration, adapter state and state dict.

    The adapter state of a layer is its active adapters, their scaling, the merged adapters, and whether adapters are
    disabled. Speed is about 1 GB per second. Offloaded tensors (on the meta device) count by name, shape and dtype
    only.
    """
    import torch

    from safelora_fast.models.anatomy import adapter_layers

    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    settings = {name: value for name, value in settings.items() if name not in UNIMPORTANT}
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, layer in adapter_layers(model):
        state = [
            getattr(layer, key, None) for key in ("active_adapters", "merged_adapters", "disable_adapters", "scaling")
        ]
        found.update(json.dumps([name, *state], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            _add(found, name, tensor)
    return found.hexdigest()


def base_weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 of a module's state dict and buffers without its adapters, as if PEFT had not wrapped it.

    Speed is about 1 GB per second. Collective if FSDP2 shards the module.
    """
    import torch

    from safelora_fast.models.anatomy import adapter_layers

    wrappers = {name for name, _ in adapter_layers(module)}
    tensors = {**dict(module.named_buffers()), **module.state_dict()}
    named = {_name_without_adapter(name, wrappers): tensor for name, tensor in tensors.items()}
    found = hashlib.sha256()
    for name in sorted(name for name in named if name is not None):
        if isinstance(named[name], torch.Tensor):
            _add(found, name, named[name])
    return found.hexdigest()


def _add(found: Any, name: str, tensor: torch.Tensor) -> None:
    """Add a tensor to a digest; sharded ones are gathered."""
    import torch

    from safelora_fast.models.anatomy import gathered

    found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
    flat = gathered(tensor.detach()).reshape(-1)
    for start in range(0, 0 if flat.is_meta else len(flat), VALUES):
        found.update(flat[start : start + VALUES].cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _name_without_adapter(name: str, wrappers: set[str]) -> str | None:
    """Return the name that a tensor has without PEFT's wrappers; None if it belongs to an adapter."""
    steps, kept = name.split("."), []
    for index, step in enumerate(steps):
        if ".".join(steps[:index]) not in wrappers:
            kept.append(step)
        elif step not in {"base_layer", "original_module"}:
            return None
    return ".".join(kept)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of a tokenizer's rules, without its chat template (see :func:`template_digest`)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:  # padding and truncation keep the values of the last call
        rules = {
            key: value for key, value in json.loads(backend.to_str()).items() if key not in {"padding", "truncation"}
        }
    tokens = [list(tokenizer(PROBE, add_special_tokens=special)["input_ids"]) for special in (False, True)]
    known = [type(tokenizer).__name__, dict(tokenizer.special_tokens_map), rules, tokens]
    return text_digest(known)


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the SHA-256 of the chat template, with today's date if the template writes it; None without a template."""
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return None
    text = json.dumps(template, sort_keys=True)
    date = datetime.datetime.now().date().isoformat() if "strftime_now" in text and _is_dated(tokenizer) else ""
    return hashlib.sha256(f"{text}{date}".encode()).hexdigest()


def _is_dated(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the template writes the date; False for an unusable template, which other code refuses."""
    try:
        return chat_of(tokenizer).dated
    except DataError:
        return False
