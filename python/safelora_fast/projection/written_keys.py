"""The output keys of a projected adapter: its modules' names in the aligned model's class, if these can be inferred."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.adapter_keys import FACTOR, PREFIX, is_targeted
from safelora_fast.checkpoints.conversions import in_the_table
from safelora_fast.checkpoints.tensor_names import WRAPPERS
from safelora_fast.printable import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from safelora_fast.checkpoints.adapter import Adapter
    from safelora_fast.checkpoints.sources import Checkpoint
    from safelora_fast.projection.jobs import Plan

SEVERAL_PARTS = re.compile(r"(text|vision|audio|language|llm|thinker|talker)_config")


def settled_adapters(plan: Plan, aligned: Checkpoint) -> list[Adapter]:
    """Return the plan's adapters with the keys of the aligned model's class, and notes about changed or unread keys."""
    met: list[list[tuple[str, str]]] = [[] for _ in plan.adapters]
    for planned in plan.modules:
        for factors in planned.group.factors:
            met[factors.adapter].append((factors.module.name, planned.sources[0].aligned))
    return [_settled(adapter, modules, aligned) for adapter, modules in zip(plan.adapters, met, strict=True)]


def _settled(adapter: Adapter, modules: Sequence[tuple[str, str]], aligned: Checkpoint) -> Adapter:
    """Settle one adapter; `modules` holds pairs of a module's name and its tensor in the aligned checkpoint."""
    keys = _with_decoder(adapter, modules, aligned)
    notes = [
        *_renaming_note(keys),
        *([] if keys != adapter.keys else _class_note(modules, adapter.config, aligned.config or {})),
        *_untargeted_note(_named_as(keys, adapter), adapter.config),
    ]
    return replace(adapter, keys=keys, notes=(*adapter.notes, *notes))


def _with_decoder(adapter: Adapter, modules: Sequence[tuple[str, str]], aligned: Checkpoint) -> Mapping[str, str]:
    """Add the decoder's name to keys that lack it, and remove a doubled one.

    This applies only to causal text models: their names on disk equal those of the class, and none starts with a layer.
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
    renamed = theirs == "backbone." and in_the_table(aligned.config or {})  # transformers loads it as `model.`
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
    """Return the output names of modules with LoRA factors, except experts."""
    found = (FACTOR.fullmatch(keys[module.lora_b_key]) for module in adapter.modules if module.kind != "parameter")
    return [match[1].removeprefix(PREFIX).rpartition(".")[0] for match in found if match is not None]


def _renaming_note(keys: Mapping[str, str]) -> list[str]:
    """Return a warning about renamed keys."""
    changed = [key for key, new in keys.items() if key != new]
    if not changed:
        return []
    return [
        f"{counted(len(changed), 'key')} of its file are not those that PEFT reads: in PEFT these tensors would do nothing; what "
        f"is written is {keys[changed[0]]} for {changed[0]}, and so on"
    ]


def _class_note(modules: Sequence[tuple[str, str]], config: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """Return a warning if the modules have the names of another class than a causal text model."""
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
    """Return a warning about factors that PEFT ignores because the configuration does not target their modules."""
    left_out = [name for name in names if not is_targeted(name, config)]
    if not left_out:
        return []
    more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
    return [
        f"target_modules and the like in adapter_config.json do not ask for {left_out[0]}{more}: PEFT leaves these factors out, "
        "so the update of these modules is zero"
    ]


def _fronts(name: str, tensor: str) -> tuple[str, str]:
    """Return the prefixes of two dotted names before their common suffix, each with its trailing dot."""
    ours, theirs = name.split("."), tensor.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return "".join(f"{part}." for part in ours), "".join(f"{part}." for part in theirs)


def _of_several_parts(model: Mapping[str, Any]) -> bool:
    """Return whether a model has several towers, so that names on disk may differ from those of its class."""
    return any(SEVERAL_PARTS.fullmatch(key) and value for key, value in model.items())
