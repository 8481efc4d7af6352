"""Find the checkpoint tensors that hold a module's weight. Tensors are paired by name, never by position.

An exact name wins. Otherwise names are compared in one canonical spelling, without leading wrappers (`model.`,
`language_model.`, …). The canonical spelling covers the renamings that transformers does while loading. Exactly one
tensor must match.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from safelora_fast.checkpoints.conversions import LoadedNames
from safelora_fast.checkpoints.tensor_names import NameIndex, Piece, canonical
from safelora_fast.errors import CheckpointError, PairingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safelora_fast.checkpoints.sources import Checkpoint

SHARED = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")  # shared by an encoder and its decoder
INPUT_EMBEDDINGS = (*SHARED, "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings")
HEAD = "lm_head"

# Fused modules: each stacks the rows of these modules, in this order.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSED_IN = {part: (fused, index) for fused, parts in FUSED.items() for index, part in enumerate(parts)}
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<leaf>[^.]+)")
QUANTIZED = (
    *("qweight", "qzeros", "scales", "weight_packed", "weight_scale", "weight_scale_inv", "weight_format"),
    *("weight.absmax", "weight.quant_map", "SCB", "weight.SCB"),
)


class TensorNames:
    """Tensor names of one checkpoint, searchable by module name."""

    def __init__(self, checkpoint: Checkpoint, role: Literal["aligned", "base", "fine-tuned"]) -> None:
        self.checkpoint = checkpoint
        self.role = role
        self.config: Mapping[str, Any] = checkpoint.config or {}
        self._index = NameIndex(checkpoint.names)
        self._loaded = LoadedNames(checkpoint)
        self._tower: str | None = None
        self._by_pattern: dict[str, dict[tuple[str, ...], list[str]]] | None = None

    def within(self, tower: str | None) -> TensorNames:
        """Return a copy for an adapter of this tower (:func:`~safelora_fast.checkpoints.tensor_names.tower_of`)."""
        names = copy.copy(self)
        names._tower = tower
        return names

    def setting(self, name: str) -> Any:
        """Return a setting from config.json or from its `text_config`."""
        inner = self.config.get("text_config")
        value = self.config.get(name)
        return inner.get(name) if value is None and isinstance(inner, dict) else value

    def find(self, name: str) -> str | None:
        """Return the one tensor that matches this name, or None.

        Raises:
            PairingError: several tensors match; they differ only in wrappers or tower.
        """
        found = self._index.find(name, self._tower)
        if len(found) > 1:
            raise PairingError(
                f"{name}: the {self.role} model {self.checkpoint.description} has several tensors that may be meant: "
                f"{', '.join(sorted(found)[:4])}; the adapter does not say which: give a checkpoint of the class that it was "
                "trained on"
            )
        return found[0] if found else None

    def weight(self, module: str) -> tuple[Piece, ...]:
        """Return the pieces whose stacked rows form the weight of a linear or embedding module.

        Raises:
            PairingError: no tensor matches; the message lists the nearest names.
        """
        if whole := self.find(f"{module}.weight"):
            return (Piece(whole),)
        pieces = self._tied(module) or self._stacked(module) or self._fused(module) or self._expert(module)
        if pieces is None and (converted := self._loaded.find(f"{module}.weight", self._tower)):
            pieces = None if converted.of_experts else converted.matrices[0]
        if pieces is None:
            raise self.missing(module, f"{module}.weight")
        return pieces

    def parameter(self, module: str, parameter: str) -> str | tuple[tuple[Piece, ...], ...] | None:
        """Return the tensor that holds a parameter of all experts, or the pieces of each expert, or None."""
        for name in (f"{module}.{parameter}", f"{module}.{parameter}.weight"):
            if fused := self.find(name):
                return fused
        experts: list[tuple[Piece, ...]] = []
        while pieces := self._separate(f"{module}.{len(experts)}.{parameter}"):
            experts.append(pieces)
        if experts:
            return tuple(experts)
        converted = self._loaded.find(f"{module}.{parameter}", self._tower)
        if converted is None:
            return None
        return converted.matrices if converted.of_experts else converted.matrices[0][0].tensor

    def missing(self, module: str, looked_for: str) -> PairingError:
        """Return the error for a module without a tensor. It names the quantized tensor or the nearest names."""
        name, model = canonical(looked_for), f"{module}: the {self.role} model {self.checkpoint.description}"
        original = "give the weights that it was quantized from"
        for ending in QUANTIZED:
            if found := self._index.by_canonical.get(f"{name.removesuffix('.weight')}.{ending}"):
                return PairingError(f"{model} holds it quantized ({found[0]}); {original}")
        if (method := self.checkpoint.quantization) is not None:
            return PairingError(
                f"{model} has no tensor {looked_for}, and is quantized as its config.json says ({method}); {original}"
            )
        near = self._nearest(name)
        candidates = f"the nearest are {', '.join(near)}" if near else "none has a similar name"
        return PairingError(f"{model} has no tensor {looked_for}; {candidates}")

    def _nearest(self, name: str) -> list[str]:
        """Return up to three tensors with similar names. Numbers are ignored, because a large model has thousands."""
        if self._by_pattern is None:
            self._by_pattern = defaultdict(dict)
            for known, tensors in self._index.by_canonical.items():
                self._by_pattern[NUMBER.sub("#", known)][tuple(NUMBER.findall(known))] = tensors
        numbers, near = tuple(NUMBER.findall(name)), []
        for pattern in difflib.get_close_matches(NUMBER.sub("#", name), list(self._by_pattern), n=3, cutoff=0.6):
            alike = self._by_pattern[pattern]
            near += alike.get(numbers) or next(iter(alike.values()))
        return near[:3]

    def refuse_quantized(self, tensor: str) -> None:
        """Raise CheckpointError if scales of a quantized weight are stored next to a tensor."""
        module = tensor.removesuffix(".weight")
        beside: tuple[str, ...] = QUANTIZED
        if self.checkpoint.quantization is not None:  # whatever names the quantization method uses
            beside += tuple(name.removeprefix(f"{module}.") for name in self._beside[module] - {"weight", "bias"})
        for ending in beside:
            if f"{module}.{ending}" in self.checkpoint:
                raise CheckpointError(  # spelled as in 0.1.0, because scripts look for the word
                    f"{self.checkpoint.description}: {tensor} is quantised ({module}.{ending} lies beside it); give "
                    f"the weights that the {self.role} model was quantized from"
                )

    @cached_property
    def _beside(self) -> Mapping[str, set[str]]:
        """Names of the tensors under each module, without the module's own name."""
        found: dict[str, set[str]] = defaultdict(set)
        for name in self.checkpoint.names:
            parts = name.split(".")
            for length in range(max(1, len(parts) - 2), len(parts)):
                found[".".join(parts[:length])].add(".".join(parts[length:]))
        return found

    def _tied(self, module: str) -> tuple[Piece, ...] | None:
        """Return the tensor that the head and the input embeddings share; transformers saves it once."""
        name = canonical(module)
        others = INPUT_EMBEDDINGS if name == HEAD else (*SHARED, HEAD) if name in SHARED else (HEAD,)
        known = name == HEAD or name in INPUT_EMBEDDINGS
        if not known or self.checkpoint.config is None or self.setting("tie_word_embeddings") is False:
            return None
        if name in {HEAD, *SHARED} and (shared := self.find("shared.weight")):
            return (Piece(shared),)  # any others on disk are copies of it
        found = {tensor for other in others if (tensor := self.find(f"{other}.weight"))}
        return (Piece(found.pop()),) if len(found) == 1 else None

    def _separate(self, module: str) -> tuple[Piece, ...] | None:
        """Return the module's own tensor, or the tensors of the modules that it fuses."""
        whole = self.find(f"{module}.weight")
        return (Piece(whole),) if whole else self._stacked(module)

    def _stacked(self, module: str) -> tuple[Piece, ...] | None:
        """Return the tensors of the modules that this one fuses."""
        owner, _, leaf = module.rpartition(".")
        found = [self.find(f"{owner}.{part}.weight") for part in FUSED.get(leaf, ())]
        return tuple(Piece(tensor) for tensor in found if tensor) if found and all(found) else None

    def _fused(self, module: str) -> tuple[Piece, ...] | None:
        """Return this module's part of a fused tensor."""
        owner, _, leaf = module.rpartition(".")
        return self._part(owner, leaf, ".weight")

    def _part(self, owner: str, leaf: str, ending: str, expert: int | None = None) -> tuple[Piece, ...] | None:
        if leaf not in FUSED_IN:
            return None
        fused, index = FUSED_IN[leaf]
        tensor = self.find(f"{owner}.{fused}{ending}")
        return (Piece(tensor, expert, index, len(FUSED[fused])),) if tensor else None

    def _expert(self, module: str) -> tuple[Piece, ...] | None:
        """Return the part of one expert in a tensor that holds all experts."""
        match = EXPERT.fullmatch(canonical(f"{module}.weight").removesuffix(".weight"))
        if match is None:
            return None
        owner, expert, leaf = match["experts"], int(match["index"]), match["leaf"]
        if tensor := self.find(f"{owner}.{leaf}"):
            return (Piece(tensor, expert),)
        return self._part(owner, leaf, "", expert)
