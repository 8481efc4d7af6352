"""A PEFT LoRA adapter on disk: which modules it adapts, and with which of its tensors."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safelora_fast import _core
from safelora_fast.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
FLOATS = {"F32", "BF16", "F16"}

Kind = Literal["linear", "embedding"]

LEFT = re.compile(r"(?P<module>.+)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.weight)?")
BIAS = re.compile(r".+\.lora_B\.bias")

BASE_CHANGING = {"pissa", "olora", "corda", "loftq", "lora_ga"}
VARIANTS = {
    "use_dora": "DoRA rescales the whole weight by a learned magnitude, so projecting B alone does not project the update",
    "use_qalora": "QALoRA pools the input, so its factors do not multiply to an update of the weight",
    "use_bdlora": "BD-LoRA keeps block-diagonal factors",
    "alora_invocation_tokens": "aLoRA applies to a part of the tokens only; project it with tools that know them",
}


@dataclass(frozen=True)
class LoraModule:
    """One adapted module: ΔW = s·left·right, in the orientation that the kind tells.

    Attributes:
        name: path of the module, without `base_model.model.`.
        left_key: tensor that the projection changes, (m, r).
        right_key: tensor that it leaves alone, (r, n).
    """

    name: str
    kind: Kind
    left_key: str
    right_key: str
    left_shape: tuple[int, int]
    right_shape: tuple[int, int]

    @property
    def rank(self) -> int:
        """The number of columns of left."""
        return self.left_shape[1]


@dataclass(frozen=True)
class Adapter:
    """An adapter whose every tensor is accounted for: a factor of a module, or copied through with a reason."""

    path: Path
    config: Mapping[str, Any]
    file: _core.SafetensorsFile
    modules: tuple[LoraModule, ...]
    copied: tuple[tuple[str, str], ...]


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter's configuration and header.

    Args:
        path: the folder that PEFT's save_pretrained wrote.

    Raises:
        AdapterError: when it is no LoRA adapter, or of a variant that projection does not apply to.
        CheckpointError: when the safetensors file is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise AdapterError(f"{folder}: {what}; give the adapter's folder, which holds {CONFIG}")
    config = _read_config(folder)
    _refuse_variants(folder, config)
    if not (folder / WEIGHTS).exists():
        if (folder / "adapter_model.bin").exists():
            raise AdapterError(
                f"{folder}: holds adapter_model.bin, a pickle, which is not read here; load the adapter with PEFT and "
                "call save_pretrained to convert it"
            )
        raise AdapterError(f"{folder}: holds no {WEIGHTS}")
    file = _core.SafetensorsFile(str(folder / WEIGHTS))
    modules, copied = _account(folder, config, file)
    return Adapter(folder, config, file, modules, copied)


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG}"))
        hint = f"; the adapters in it are {', '.join(inside)}: give one of these folders" if inside else ""
        raise AdapterError(f"{folder}: holds no {CONFIG}, so it is not a PEFT adapter{hint}") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: must hold a JSON object")
    return config


def _refuse_variants(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{folder}: peft_type is {kind}; only LoRA adapters can be projected")
    for key, reason in VARIANTS.items():
        if config.get(key):
            raise AdapterError(f"{folder}: {key} is set: {reason}; this adapter cannot be projected")
    init = str(config.get("init_lora_weights", "")).lower()
    if any(init.startswith(name) for name in BASE_CHANGING):
        raise AdapterError(
            f"{folder}: was initialised with {init}, which also changes the base weights, so B·A is not the update of the "
            "original model; convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…) first"
        )


def _account(
    folder: Path, config: Mapping[str, Any], file: _core.SafetensorsFile
) -> tuple[tuple[LoraModule, ...], tuple[tuple[str, str], ...]]:
    """Give every tensor of the file a role."""
    factors: dict[tuple[str, str], str] = {}
    copied: list[tuple[str, str]] = []
    tensors = file.tensors
    for key in tensors:
        if "lora_magnitude_vector" in key:
            raise AdapterError(f"{folder}: {key} belongs to DoRA: {VARIANTS['use_dora']}")
        if BIAS.fullmatch(key):
            copied.append((key, "bias of lora_B: not part of B·A"))
        elif match := LEFT.fullmatch(key):
            factors[match["module"].removeprefix(PREFIX), match["factor"]] = key
        elif ".lora_" in key:
            raise AdapterError(f"{folder}: tensor {key!r} belongs to a LoRA variant that is not known here")
        else:
            copied.append((key, "trained in full (modules_to_save, bias or new embeddings): it has no B·A"))
    if not factors:
        raise AdapterError(f"{folder}: {WEIGHTS} holds no LoRA factors")
    modules = []
    for module, factor in factors:
        left, right = ("lora_B", "lora_A") if "embedding" not in factor else ("lora_embedding_B", "lora_embedding_A")
        if factor == right:
            continue
        modules.append(_module(folder, module, factors.get((module, left)), factors.get((module, right)), tensors))
    for module, factor in factors:
        other = factor[:-1] + ("B" if factor.endswith("A") else "A")
        if (module, other) not in factors:
            raise AdapterError(f"{folder}: module {module} has {factor} but no {other}")
    if config.get("target_parameters") and any(len(tensors[key][1]) != 2 for key in factors.values()):
        raise AdapterError(f"{folder}: a factor of a target parameter is not a matrix")
    return tuple(modules), tuple(copied)


def _module(
    folder: Path,
    name: str,
    left_key: str | None,
    right_key: str | None,
    tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]],
) -> LoraModule:
    if left_key is None or right_key is None:
        raise AdapterError(f"{folder}: module {name} has only one of its two LoRA factors")
    for key in (left_key, right_key):
        dtype, shape = tensors[key][:2]
        if dtype not in FLOATS:
            raise AdapterError(f"{folder}: {key} is {dtype}; LoRA factors must be F32, BF16 or F16")
        if len(shape) != 2:
            raise AdapterError(f"{folder}: {key} has shape {list(shape)}; only factors of matrices can be projected")
    (m, r), (r_right, n) = tensors[left_key][1], tensors[right_key][1]
    if r != r_right:
        raise AdapterError(f"{folder}: the factors of {name} do not multiply: {[m, r]} by {[r_right, n]}")
    kind: Kind = "embedding" if "lora_embedding" in left_key else "linear"
    return LoraModule(name, kind, left_key, right_key, (m, r), (r_right, n))
