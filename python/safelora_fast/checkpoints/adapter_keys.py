"""The keys under which PEFT looks for an adapter's tensors.

PEFT loads lora_A and lora_B only under the exact name of their module after `base_model.model.`. It skips every other
tensor, with a warning at most, and B stays zero. The output therefore uses the keys that PEFT reads, where these are
certain.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


PREFIX = "base_model.model."
# Prefixes that torch.compile, FSDP, activation checkpointing and DDP add to module names.
TRAINING_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\."
)
NAMED_FACTOR = re.compile(r"(.+\.lora_(?:embedding_)?[AB])\.(?!weight$|bias$)([^.]+)(\.weight|\.bias)?")
FACTOR = re.compile(r"(.+\.lora_(embedding_)?[AB])(\.weight)?")
# Keys of modules_to_save and trainable_token_indices with the adapter's name, which PEFT drops when it saves.
NAMED_COPY = re.compile(r"(.+)\.modules_to_save\.([^.]+)\.(.+)|(.+\.trainable_tokens_delta)\.([^.]+)")


def peft_keys(folder: object, keys: Iterable[str]) -> dict[str, str]:
    """Return the key that PEFT reads for every key of an adapter's file, as far as the keys alone determine it.

    Training wrappers and the adapter's name are removed, and every key starts with exactly one `base_model.model.`.
    Keys of lora_A and lora_B end in `.weight`. Keys of lora_embedding_A and lora_embedding_B do not.

    Raises:
        AdapterError: the keys name several adapters, or two keys become the same.
    """
    found: dict[str, str] = {}
    owners: dict[str, str] = {}
    adapters: set[str] = set()
    for key in keys:
        name = TRAINING_WRAPPERS.sub("", key)
        while name.startswith(PREFIX):
            name = name.removeprefix(PREFIX)
        if named := NAMED_FACTOR.fullmatch(name):
            adapters.add(named[2])
            name = named[1] + (named[3] or "")
        elif kept := NAMED_COPY.fullmatch(name):
            adapters.add(kept[2] or kept[5])
            name = f"{kept[1]}.{kept[3]}" if kept[2] else kept[4]
        if factor := FACTOR.fullmatch(name):
            name = factor[1] if factor[2] else f"{factor[1]}.weight"
        found[key] = PREFIX + name
        if (other := owners.setdefault(found[key], key)) != key:
            raise AdapterError(f"{folder}: {other!r} and {key!r} are both {found[key]!r} to PEFT; keep one of them")
    if len(adapters) > 1:
        raise AdapterError(
            f"{folder}: the keys carry the names of several adapters ({', '.join(sorted(adapters))}); write one of them with "
            "PEFT's save_pretrained"
        )
    return found


def is_targeted(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether PEFT adapts a module.

    Read target_modules, exclude_modules and layers_to_transform. The result is True if unknown.
    """
    excluded, targets = config.get("exclude_modules"), config.get("target_modules")
    if excluded and _named(name, excluded):
        return False
    if not targets or targets == "all-linear":
        return True
    if not _named(name, targets):
        return False
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or [r"[^.]*"]
    if layers is None or layers == [] or isinstance(targets, str):
        return True
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _named(name: str, wanted: object) -> bool:
    """Return whether a pattern matches the whole name, or a list contains an ending of it."""
    if isinstance(wanted, str):
        try:
            return re.fullmatch(wanted, name) is not None
        except re.error:
            return True
    return any(name == one or name.endswith(f".{one}") for one in wanted) if isinstance(wanted, list) else True
