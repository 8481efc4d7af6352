"""The keys under which PEFT looks for an adapter's tensors, and what becomes of keys that it would pass over.

PEFT takes a factor only under the exact name of its module behind `base_model.model.`, and leaves every other tensor out,
with a warning at most: B stays zero. So what is projected is written under the keys that PEFT reads, where these are certain.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.conversions import in_the_table
from safelora_fast.checkpoints.tensor_names import WRAPPERS
from safelora_fast.errors import AdapterError
from safelora_fast.projection.report import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from safelora_fast.checkpoints.adapter import Adapter
    from safelora_fast.checkpoints.sources import Checkpoint
    from safelora_fast.projection.jobs import Plan

PREFIX = "base_model.model."
# Components that torch.compile, FSDP, activation checkpointing and DDP put into the names of a model's modules.
TRAINING_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\."
)
NAMED_FACTOR = re.compile(r"(.+\.lora_(?:embedding_)?[AB])\.(?!weight$|bias$)([^.]+)(\.weight|\.bias)?")
FACTOR = re.compile(r"(.+\.lora_(embedding_)?[AB])(\.weight)?")
# What modules_to_save and trainable_token_indices train, with the adapter's name that PEFT takes out when it saves.
NAMED_COPY = re.compile(r"(.+)\.modules_to_save\.([^.]+)\.(.+)|(.+\.trainable_tokens_delta)\.([^.]+)")
SEVERAL_PARTS = re.compile(r"(text|vision|audio|language|llm|thinker|talker)_config")


def peft_keys(folder: object, keys: Iterable[str]) -> dict[str, str]:
    """The key that PEFT reads for every key of an adapter's file, as far as the keys alone tell.

    Wrappers of training are taken out, `base_model.model.` is put in front exactly once, the adapter's name is taken out,
    and `.weight` is put behind lora_A and lora_B and taken off the factors of embeddings.

    Raises:
        AdapterError: the keys carry names of several adapters, or two of them become one.
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


def settled_adapters(plan: Plan, aligned: Checkpoint) -> list[Adapter]:
    """The adapters of a plan with the keys that their modules have in the aligned model's class, and notes about them.

    Args:
        plan: which tensor meets which module.
        aligned: the model that the adapters were trained on.
    """
    met: list[list[tuple[str, str]]] = [[] for _ in plan.adapters]
    for planned in plan.modules:
        for target in planned.targets:
            met[target.adapter].append((target.module.name, planned.sources[0].aligned))
    return [_settled(adapter, modules, aligned) for adapter, modules in zip(plan.adapters, met, strict=True)]


def _settled(adapter: Adapter, modules: Sequence[tuple[str, str]], aligned: Checkpoint) -> Adapter:
    """One of them; `modules` are its modules, each with the tensor of the aligned checkpoint that holds its weight."""
    keys = _with_decoder(adapter, modules, aligned)
    notes = [
        *_renaming_note(keys),
        *([] if keys != adapter.keys else _class_note(modules, adapter.config, aligned.config or {})),
        *_untargeted_note(_named_as(keys, adapter), adapter.config),
    ]
    return replace(adapter, keys=keys, notes=(*adapter.notes, *notes))


def _with_decoder(adapter: Adapter, modules: Sequence[tuple[str, str]], aligned: Checkpoint) -> Mapping[str, str]:
    """Keys with the name of the decoder put in where it is cut off, or taken out where it is there twice.

    Certain for causal text models only: there the names on disk are those of the class, and none begins with a layer.
    """
    if adapter.config.get("task_type") != "CAUSAL_LM" or _of_several_parts(aligned.config or {}):
        return adapter.keys
    pairs = [(name, tensor.removesuffix(".weight")) for name, tensor in modules]
    fronts = {_fronts(*pair) for pair in pairs if pair[0].rpartition(".")[2] == pair[1].rpartition(".")[2]} - {("", "")}
    if len(fronts) != 1:
        return adapter.keys
    ((ours, theirs),) = fronts
    firsts = {
        name.removeprefix(ours).partition(".")[0] for name, tensor in pairs if _fronts(name, tensor) == (ours, theirs)
    }
    renamed = theirs == "backbone." and in_the_table(aligned.config or {})  # to `model.`, while transformers loads it
    cut = not ours and bool(theirs) and not renamed and not firsts & WRAPPERS
    doubled = not theirs and {f"{first}." for first in firsts} == {ours}
    if not (cut or doubled):
        return adapter.keys

    def mended(key: str) -> str:
        name = key.removeprefix(PREFIX)
        factor = FACTOR.fullmatch(name)
        stem = name if factor is None else factor[1].rpartition(".")[0] + ".weight"
        if not name.startswith(ours) or stem.replace(".base_layer", "") in aligned:
            return key
        rest = name.removeprefix(ours)
        known = rest.partition(".")[0] in firsts or theirs + stem.removeprefix(ours) in aligned
        return f"{PREFIX}{theirs}{rest}" if known else key

    return {key: mended(new) for key, new in adapter.keys.items()}


def _named_as(keys: Mapping[str, str], adapter: Adapter) -> list[str]:
    """The modules of LoRA factors, experts aside, by the names that they are written under."""
    found = (FACTOR.fullmatch(keys[module.left_key]) for module in adapter.modules if module.kind != "parameter")
    return [match[1].removeprefix(PREFIX).rpartition(".")[0] for match in found if match is not None]


def _renaming_note(keys: Mapping[str, str]) -> list[str]:
    """A warning about keys that PEFT would not read as they are."""
    changed = [key for key, new in keys.items() if key != new]
    if not changed:
        return []
    return [
        f"{counted(len(changed), 'key')} of its file are not those that PEFT reads: in PEFT these tensors would do nothing; what "
        f"is written is {keys[changed[0]]} for {changed[0]}, and so on"
    ]


def _class_note(modules: Sequence[tuple[str, str]], config: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """A warning where the modules are named as in another class than that of a causal text model."""
    if config.get("task_type") != "CAUSAL_LM" or not model or _of_several_parts(model):
        return []
    for name, tensor in modules:
        ours, _ = _fronts(name, tensor.removesuffix(".weight"))
        if {"language_model", "text_model"} & set(ours.split(".")) or re.match(r"\w+\.\d+\.", name):
            return [
                f"its modules are named as in another class than aligned's ({name}, for {tensor}): the keys are kept, and PEFT "
                "loads them in the class that the adapter was trained in only"
            ]
    return []


def _untargeted_note(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """A warning about factors that PEFT leaves out because the configuration does not ask for their modules."""
    left_out = [name for name in names if not is_targeted(name, config)]
    if not left_out:
        return []
    more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
    return [
        f"target_modules and the like in adapter_config.json do not ask for {left_out[0]}{more}: PEFT leaves these factors out, "
        "so the update of these modules is zero"
    ]


def is_targeted(name: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT gives a module factors, by target_modules, exclude_modules and layers_to_transform; True where unknown."""
    excluded, targets = config.get("exclude_modules"), config.get("target_modules")
    if excluded and _named(name, excluded):
        return False
    if not targets or targets == "all-linear":
        return True
    if not _named(name, targets):
        return False
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == [] or isinstance(targets, str):
        return True
    if not patterns:
        patterns = [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _named(name: str, wanted: object) -> bool:
    """Whether a pattern matches the whole name, or a list holds its end."""
    if isinstance(wanted, str):
        try:
            return re.fullmatch(wanted, name) is not None
        except re.error:
            return True
    return any(name == one or name.endswith(f".{one}") for one in wanted) if isinstance(wanted, list) else True


def _fronts(name: str, tensor: str) -> tuple[str, str]:
    """What stands before the common end of two dotted names, each with its last dot."""
    ours, theirs = name.split("."), tensor.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return "".join(f"{part}." for part in ours), "".join(f"{part}." for part in theirs)


def _of_several_parts(model: Mapping[str, Any]) -> bool:
    """Whether a model has other towers beside its text model, so that names on disk need not be those of its class."""
    return any(SEVERAL_PARTS.fullmatch(key) and value for key, value in model.items())
