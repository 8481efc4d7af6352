"""Check adapter_config.json: variants whose update is not plain B·A, unknown keys, and ranks."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG = "adapter_config.json"
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# PEFT initializations that set only lora_A and lora_B; the base weights stay unchanged.
KEEPS_BASE_WEIGHTS = {"gaussian", "eva", "orthogonal", "mica"}
PLAIN_STARTS = {"true", "false", "none", "", *KEEPS_BASE_WEIGHTS}
VARIANTS = {
    "use_dora": "DoRA rescales the whole weight by a learned magnitude, so projecting B does not project the update",
    "use_qalora": "QALoRA pools the input, so its factors do not multiply to an update of the weight",
    "use_bdlora": "BD-LoRA keeps block-diagonal factors",
    "kasa_config": "KaSA cuts the base weight and puts a diagonal between B and A",
    "velora_config": "VeLoRA is not known to train a plain B·A",
    "monteclora_config": "MonteCLoRA samples around its factors",
    "arrow_config": "Arrow routes between adapters per token",
    "alora_invocation_tokens": "aLoRA applies to a part of the tokens only, so B·A is not the update of the weight",
    "layer_replication": "replicated layers share one base weight, so their names do not exist in the checkpoints",
    "megatron_config": "Megatron splits layers across processes under names of its own",
}
# Known keys. Except VARIANTS, they keep ΔW = s·B·A for any value. PEFT up to 0.21 and other tools write them.
KNOWN = {
    *VARIANTS,
    *[
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ],
    *["r", "lora_alpha", "lora_dropout", "lora_bias", "use_rslora", "rank_pattern", "alpha_pattern", "bias"],
    *["target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"],
    *["modules_to_save", "trainable_token_indices", "ensure_weight_tying", "fan_in_fan_out", "init_lora_weights"],
    *[
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
        "qalora_group_size",
        "megatron_core",
    ],
    *["merge_weights", "unsloth_fixed", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"],  # by Unsloth and ms-swift
}
# Patterns of keys that could enable a LoRA variant, by PEFT's naming, with the type of the value. Bookkeeping keys of
# other tools ("lora_name", "alpha_schedule", "config_file") do not match.
SWITCHES: tuple[tuple[re.Pattern[str], type | tuple[type, ...]], ...] = (
    (re.compile(r"use_.*"), object),
    (re.compile(r".*_config"), dict),
    (re.compile(r"lora_.*"), bool),
    (re.compile(r"(.*_)?(alpha|scale|scaling|multiplier|magnitude|gate)"), (int, float, list, dict)),
    (re.compile(r"(scale|scaling)_.*|(.*_)?variant"), object),
)


def refuse_variants(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise AdapterError, with the key and the reason, unless the update is known to be s·B·A."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{folder}: peft_type is {kind}; only LoRA adapters can be projected")
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"{folder}: {CONFIG} says that r is {rank!r}; it must be a positive number")
    if config.get("lora_alpha", rank) is None:
        raise AdapterError(f"{folder / CONFIG}: lora_alpha must be a finite number, not null")
    for key, reason in VARIANTS.items():
        if config.get(key):
            raise AdapterError(f"{folder}: {key} is set: {reason}; this adapter cannot be projected")
    for key in _unknown(config):
        if any(name.fullmatch(key) and isinstance(config[key], kind) for name, kind in SWITCHES):
            raise AdapterError(
                f"{folder}: {key} is set, which is not known here: it may belong to a variant of LoRA that is not B·A; "
                "a newer safelora-fast may know it"
            )
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(BASE_CHANGING):
        raise AdapterError(
            f"{folder}: was initialized with {init}, which also changes the base weights, so B·A is not the update of "
            "the original model; convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…) first, in "
            "float32: the converted factors nearly cancel"
        )
    if init not in PLAIN_STARTS:
        raise AdapterError(
            f"{folder}: init_lora_weights is {config['init_lora_weights']!r}, which is not known here: it may change the base "
            "weights too, and then B·A is not the update of the original model; a newer safelora-fast may know it"
        )


def unknown_keys_note(config: Mapping[str, Any]) -> list[str]:
    """Return a warning about unknown keys that do not look like those of a variant."""
    unknown = [f"{key} = {config[key]!r}" for key in _unknown(config)]
    if not unknown:
        return []
    return [
        f"{CONFIG} has settings that are not known here ({', '.join(unknown)}): if one of them changes what the adapter computes, "
        "the projection is not that of its update"
    ]


def other_ranks_note(config: Mapping[str, Any], ranks: Mapping[str, int]) -> list[str]:
    """Return a warning about modules whose rank differs from the configuration, because PEFT does not load them."""
    odd = sorted(name for name, rank in ranks.items() if rank != _rank_of(name, config))
    if not odd:
        return []
    return [
        f"the factors of {odd[0]} have rank {ranks[odd[0]]}, and {CONFIG} gives it {_rank_of(odd[0], config)} "
        f"({len(odd)} such modules): PEFT will not load the adapter before r or rank_pattern is corrected"
    ]


def scaling(name: str, config: Mapping[str, Any]) -> float:
    """Return the factor of B·A that PEFT applies in a module: lora_alpha/r, or lora_alpha/√r if rank-stabilized."""
    rank = _rank_of(name, config)
    alpha = _of_pattern(name, config.get("alpha_pattern"), config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _rank_of(name: str, config: Mapping[str, Any]) -> Any:
    return _of_pattern(name, config.get("rank_pattern"), config["r"])


def _of_pattern(name: str, pattern: Mapping[str, Any] | None, default: Any) -> Any:
    """Return what PEFT gives a module: the value of the first key that equals or ends its name, else the default."""
    for key, value in (pattern or {}).items():
        try:
            if key == name or re.match(rf"(?:.*\.)?({key})$", name):
                return value
        except re.error:
            continue
    return default


def _unknown(config: Mapping[str, Any]) -> list[str]:
    """Return unknown keys whose value is not null, false, 0 or empty."""
    return [key for key, value in config.items() if value and key not in KNOWN]
