"""Read a PEFT LoRA adapter from disk: which modules it adapts, and with which tensors."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from safelora_fast import _core
from safelora_fast.checkpoints.adapter_keys import PREFIX, peft_keys
from safelora_fast.checkpoints.lora_config import CONFIG, VARIANTS, other_ranks_note, refuse_variants, unknown_keys_note
from safelora_fast.checkpoints.resolver import adapter_folder
from safelora_fast.checkpoints.tensor_names import matching
from safelora_fast.errors import AdapterError, SettingsError
from safelora_fast.files.json_reader import (
    LIST,
    NAMES,
    NUMBER,
    OBJECT,
    TEXT,
    TEXTS,
    TOKENS,
    check_fields,
    read_json,
    why,
)
from safelora_fast.files.json_reader import Kind as JsonKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

WEIGHTS = "adapter_model.safetensors"
FLOATS = {"F32", "BF16", "F16"}

Kind = Literal["linear", "embedding", "parameter"]

HEADS = ("lm_head", "embed_out")

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
BIAS = re.compile(r".+\.lora_B\.bias")
NESTED = ".base_layer"
EXCLUDED = "excluded by "  # the start of the reason
TRAINED_IN_FULL = "trained in full (modules_to_save, bias or new embeddings): it has no B·A"

# Keys of tools that do not write PEFT's format.
OTHER_TOOLS = {
    re.compile(r"\.lora_[ab](\.|$)"): "MLX or torchtune",
    re.compile(r"lora[_.](down|up)\b"): "kohya's scripts or diffusers",
}

TYPES = {
    **dict.fromkeys(("peft_type", "peft_version", "base_model_name_or_path", "task_type", "bias"), TEXT),
    **dict.fromkeys(("target_parameters", "modules_to_save"), TEXTS),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), NAMES),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), OBJECT),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), NUMBER),
    "alora_invocation_tokens": JsonKind("a list of tokens", lambda value: LIST.fits(value) and TOKENS.fits(value)),
}  # types of the settings that are read here, or by PEFT without a check


@dataclass(frozen=True)
class LoraModule:
    """One pair of lora_A and lora_B, as PEFT names and stores it.

    For "linear" and "embedding", ΔW = s·B·A with W (out, in). For "parameter" (PEFT's `target_parameters`), both
    tensors hold every expert. Their shapes tell which one has the output dimension (checkpoints/experts.py).

    Attributes:
        name: path of the module, without `base_model.model.` and without PEFT's `base_layer`.
        lora_b_key: key of lora_B or lora_embedding_B, (m, r).
        lora_a_key: key of lora_A or lora_embedding_A, (r, n).
        parameters: for "parameter", the possible parameter names, since the keys do not name one; empty if unknown.
        depth: for "parameter", how deep PEFT nested the pair; 0 is the outermost.
    """

    name: str
    kind: Kind
    lora_b_key: str
    lora_a_key: str
    lora_b_shape: tuple[int, int]
    lora_a_shape: tuple[int, int]
    parameters: tuple[str, ...] = ()
    depth: int = 0

    @property
    def rank(self) -> int:
        """Number of columns of lora_B."""
        return self.lora_b_shape[1]


@dataclass(frozen=True)
class Adapter:
    """An adapter. Every tensor is lora_A or lora_B of a module, or is copied for a stated reason.

    Attributes:
        keys: for each key of the file, the key that PEFT reads and that is written.
        notes: warnings about the adapter's own files.
        excluded: the excluded modules, whose tensors are copied.
    """

    path: Path
    config: Mapping[str, Any]
    file: _core.SafetensorsFile
    modules: tuple[LoraModule, ...]
    copied: tuple[tuple[str, str], ...]
    keys: Mapping[str, str]
    notes: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()


def load_adapters(
    paths: Sequence[str | Path], exclude: Sequence[str] = (), *, keep_keys: bool = False
) -> list[Adapter]:
    """Read several adapters.

    Raises:
        AdapterError, CheckpointError: see :func:`load_adapter`.
        SettingsError: an exclude pattern matches no module of any adapter.
    """
    adapters = [load_adapter(path, exclude, keep_keys=keep_keys) for path in paths]
    check_exclude(adapters, exclude)
    return adapters


def check_exclude(adapters: Sequence[Adapter], exclude: Sequence[str]) -> None:
    """Raise SettingsError if a pattern matches no module of any adapter."""
    for pattern in exclude:
        if not any(matching(name, [pattern]) for adapter in adapters for name in adapter.excluded):
            ends = sorted({module.name.rpartition(".")[2] for adapter in adapters for module in adapter.modules})
            raise SettingsError(f"exclude: no adapted module is called {pattern!r}; they end in {', '.join(ends)}")


def load_adapter(path: str | Path, exclude: Sequence[str] = (), *, keep_keys: bool = False) -> Adapter:
    """Read an adapter's configuration and header.

    Args:
        path: the folder that PEFT's save_pretrained wrote, or a Hub id with an optional `@revision`.
        exclude: names or patterns of modules to exclude (:func:`~safelora_fast.checkpoints.tensor_names.matching`).
        keep_keys: keep the keys unchanged, because they come from a loaded model.

    Raises:
        AdapterError: this is not a LoRA adapter, or it is a variant that cannot be projected.
        CheckpointError: the safetensors file is damaged.
    """
    folder = adapter_folder(path)
    config = read_config(folder)
    refuse_variants(folder, config)
    if not os.path.lexists(folder / WEIGHTS):
        raise AdapterError(
            f"{folder}: holds adapter_model.bin, a pickle, which is not read here; load the adapter with PEFT and "
            "call save_pretrained to convert it"
        )
    file = _core.SafetensorsFile(str(folder / WEIGHTS))
    keys = {key: key for key in file.tensors} if keep_keys else peft_keys(folder, file.tensors)
    modules, copied, left = _account(folder, config, file, keys, exclude)
    ranks = {one.name: one.rank for one in modules if one.kind != "parameter"}
    notes = (*unknown_keys_note(config), *other_ranks_note(config, ranks))
    return Adapter(folder, config, file, modules, copied, keys, notes, left)


def read_config(folder: Path) -> Mapping[str, Any]:
    """Return the content of an adapter's configuration.

    Raises:
        AdapterError: the file is missing or cannot be read.
    """
    path = folder / CONFIG
    try:
        config = check_fields(read_json(path), {}, TYPES)
        indices = config.get("trainable_token_indices") or []
        indices = indices if isinstance(indices, dict) else {"trainable_token_indices": indices}
        check_fields(indices, dict.fromkeys(indices, TOKENS))
        for name in config.get("modules_to_save") or []:
            re.compile(name)  # PEFT treats it as a pattern
        return config
    except (OSError, ValueError, re.error) as error:
        raise AdapterError(f"{path}: {why(error)}") from error


def _account(
    folder: Path,
    config: Mapping[str, Any],
    file: _core.SafetensorsFile,
    keys: Mapping[str, str],
    exclude: Sequence[str],
) -> tuple[tuple[LoraModule, ...], tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Return the modules, the copied keys with their reasons, and the excluded modules."""
    found, copied = _factors(folder, file, keys)
    targets = config.get("target_parameters") or []
    modules, excluded = [], dict[str, None]()
    for (path, is_embedding), factors in found.items():
        name = path.replace(NESTED, "")
        if pattern := matching(name, exclude):
            excluded[name] = None
            copied += [(key, f"{EXCLUDED}{pattern!r}: not projected") for key in factors.values()]
            continue
        kind: Kind = "embedding" if is_embedding else "linear"
        modules.append(_module(folder, path, kind, factors, file.tensors, targets))
    if not modules:
        raise AdapterError(
            f"{folder}: {', '.join(map(repr, exclude))} excludes every module: there is nothing to project"
        )
    of_vocabulary = [path for path, is_embedding in found if is_embedding or path.endswith(HEADS)]
    projected = any(module.kind == "embedding" or module.name.endswith(HEADS) for module in modules)
    if config.get("ensure_weight_tying") and len(of_vocabulary) > 1 and projected:
        raise AdapterError(
            f"{folder}: ensure_weight_tying makes embeddings and head share their factors, one the transpose of the other, so "
            "neither can be projected by itself; train the adapter on one of the two, or exclude both (--exclude)"
        )
    return tuple(modules), tuple(copied), tuple(excluded)


def _factors(
    folder: Path, file: _core.SafetensorsFile, keys: Mapping[str, str]
) -> tuple[dict[tuple[str, bool], dict[str, str]], list[tuple[str, str]]]:
    """Return the keys of lora_A and lora_B ("A", "B") by (module, is_embedding), and the copied keys with reasons."""
    found: dict[tuple[str, bool], dict[str, str]] = {}
    copied: list[tuple[str, str]] = []
    for key in file.tensors:
        if "lora_magnitude_vector" in key:
            raise AdapterError(f"{folder}: {key} belongs to DoRA: {VARIANTS['use_dora']}")
        if BIAS.fullmatch(keys[key]):
            copied.append((key, "bias of lora_B: not part of B·A"))
        elif match := FACTOR.fullmatch(keys[key]):
            module = match["module"].removeprefix(PREFIX), match["embedding"] is not None
            found.setdefault(module, {})[match["side"]] = key
        elif tool := next((tool for name, tool in OTHER_TOOLS.items() if name.search(key)), None):
            raise AdapterError(
                f"{folder}: {key!r} is a name of {tool}, not of PEFT; convert the adapter to PEFT's format first (lora_A and "
                f"lora_B behind {PREFIX})"
            )
        elif ".lora_" in key:
            raise AdapterError(f"{folder}: tensor {key!r} belongs to a LoRA variant that is not known here")
        elif key.endswith(f"{NESTED}.weight"):
            copied.append((key, "the base weight, which PEFT saved along"))
        else:
            copied.append((key, TRAINED_IN_FULL))
    if not found:
        raise AdapterError(f"{folder}: {WEIGHTS} holds no LoRA factors")
    return found, copied


def _module(
    folder: Path,
    path: str,
    kind: Kind,
    factors: Mapping[str, str],
    tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]],
    targets: Sequence[str],
) -> LoraModule:
    if len(factors) == 1:
        there, absent = ("A", "B") if "A" in factors else ("B", "A")
        name = "lora_embedding_" if kind == "embedding" else "lora_"
        raise AdapterError(f"{folder}: module {path} has {name}{there} but no {name}{absent}")
    for key in (factors["B"], factors["A"]):
        dtype, shape = tensors[key][:2]
        if dtype not in FLOATS:
            raise AdapterError(f"{folder}: {key} is {dtype}; LoRA factors must be F32, BF16 or F16")
        if len(shape) > 2:
            raise AdapterError(
                f"{folder}: {key} has shape {list(shape)}, of a convolution; only matrices can be projected; to exclude "
                f"this module: --exclude {path.rpartition('.')[2]}"
            )
        if len(shape) != 2 or 0 in shape:
            raise AdapterError(
                f"{folder}: {key} has shape {list(shape)}, so it is only a part of a factor; gather the shards before saving"
            )
    (m, rank), (rank_right, n) = tensors[factors["B"]][1], tensors[factors["A"]][1]
    if rank != rank_right:
        raise AdapterError(f"{folder}: the factors of {path} do not multiply: {[m, rank]} by {[rank_right, n]}")
    name, depth = path.replace(NESTED, ""), path.count(NESTED)
    parameters = parameters_of(name, targets)
    if kind == "linear" and (parameters or name.endswith(".experts")):
        kind = "parameter"
    elif kind == "linear" and depth:
        raise AdapterError(
            f"{folder}: {factors['B']!r} lies below base_layer, as PEFT names an adapter inside another one; save this adapter "
            "alone, with PEFT's save_pretrained"
        )
    return LoraModule(name, kind, factors["B"], factors["A"], (m, rank), (rank_right, n), parameters, depth)


def parameters_of(module: str, targets: Sequence[str]) -> tuple[str, ...]:
    """Return the parameters of a module that `target_parameters` names by whole trailing components, each once.

    PEFT 0.21 writes two spellings (`mlp.experts.down_proj` and `down_proj`) if it converted `target_modules`.
    """
    found: dict[str, None] = {}
    for target in sorted(set(targets)):
        owner, _, parameter = target.rpartition(".")
        if module == owner or module.endswith(f".{owner}") or (not owner and module.endswith(".experts")):
            found[parameter] = None
    return tuple(found)
