"""From the name of a module to the tensors of a checkpoint that hold its weight: by name, never by position.

An exact name wins. Otherwise names are compared after wrappers at their front (`model.`, `language_model.`, …) are
taken off and spellings that transformers converts while loading are made one; exactly one tensor must be left.
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

SHARED = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")  # of an encoder and its decoder
INPUT_EMBEDDINGS = (*SHARED, "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings")
HEAD = "lm_head"

# Fused modules: their rows are those of these modules, in this order.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSED_IN = {part: (fused, index) for fused, parts in FUSED.items() for index, part in enumerate(parts)}
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<leaf>[^.]+)")
QUANTISED = (
    *("qweight", "qzeros", "scales", "weight_packed", "weight_scale", "weight_scale_inv", "weight_format"),
    *("weight.absmax", "weight.quant_map", "SCB", "weight.SCB"),
)


class TensorNames:
    """The names of one checkpoint, ready to be asked for."""

    def __init__(self, checkpoint: Checkpoint, role: Literal["aligned", "base"]) -> None:
        self.checkpoint = checkpoint
        self.role = role
        self.config: Mapping[str, Any] = checkpoint.config or {}
        self._index = NameIndex(checkpoint.names)
        self._loaded = LoadedNames(checkpoint)
        self._tower: str | None = None
        self._by_pattern: dict[str, dict[tuple[str, ...], list[str]]] | None = None

    def within(self, tower: str | None) -> TensorNames:
        """The same names for an adapter of this tower (:func:`~safelora_fast.checkpoints.tensor_names.tower_of`)."""
        names = copy.copy(self)
        names._tower = tower
        return names

    def setting(self, name: str) -> Any:
        """A setting of config.json, looked up in the text model's part too."""
        inner = self.config.get("text_config")
        value = self.config.get(name)
        return inner.get(name) if value is None and isinstance(inner, dict) else value

    def find(self, name: str) -> str | None:
        """The one tensor of this name; None when there is none.

        Raises:
            PairingError: when several tensors differ from it by wrappers or by the tower that they belong to only.
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
        """The pieces, stacked by rows, that hold the weight of a linear or embedding module.

        Raises:
            PairingError: when there are none, naming the nearest candidates.
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
        """The tensor that holds a parameter of all experts, or the pieces of each expert, or None."""
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
        """The error for a module that has no tensor, with the nearest names."""
        name = canonical(looked_for)
        stem = name.removesuffix(".weight")
        for ending in QUANTISED:
            if found := self._index.by_canonical.get(f"{stem}.{ending}"):
                return PairingError(
                    f"{module}: the {self.role} model {self.checkpoint.description} holds it quantised ({found[0]}); "
                    "give the weights that it was quantised from"
                )
        if (method := self.checkpoint.quantization) is not None:
            return PairingError(
                f"{module}: the {self.role} model {self.checkpoint.description} has no tensor {looked_for}, and is quantised as "
                f"its config.json says ({method}); give the weights that it was quantised from"
            )
        near = self._nearest(name)
        candidates = f"the nearest are {', '.join(near)}" if near else "none has a similar name"
        return PairingError(
            f"{module}: the {self.role} model {self.checkpoint.description} has no tensor {looked_for}; {candidates}"
        )

    def _nearest(self, name: str) -> list[str]:
        """Up to three tensors of similar names; compared without numbers, of which a large model has thousands."""
        if self._by_pattern is None:
            self._by_pattern = defaultdict(dict)
            for known, tensors in self._index.by_canonical.items():
                self._by_pattern[NUMBER.sub("#", known)][tuple(NUMBER.findall(known))] = tensors
        numbers, near = tuple(NUMBER.findall(name)), []
        for pattern in difflib.get_close_matches(NUMBER.sub("#", name), list(self._by_pattern), n=3, cutoff=0.6):
            alike = self._by_pattern[pattern]
            near += alike.get(numbers) or next(iter(alike.values()))
        return near[:3]

    def refuse_quantised(self, tensor: str) -> None:
        """Refuse a weight that has the scales of a quantised one beside it."""
        module = tensor.removesuffix(".weight")
        beside: tuple[str, ...] = QUANTISED
        if self.checkpoint.quantization is not None:  # whatever its method calls them
            beside += tuple(name.removeprefix(f"{module}.") for name in self._beside[module] - {"weight", "bias"})
        for ending in beside:
            if f"{module}.{ending}" in self.checkpoint:
                raise CheckpointError(
                    f"{self.checkpoint.description}: {tensor} is quantised ({module}.{ending} lies beside it); give "
                    f"the weights that the {self.role} model was quantised from"
                )

    @cached_property
    def _beside(self) -> Mapping[str, set[str]]:
        """What each module has besides its weight."""
        found: dict[str, set[str]] = defaultdict(set)
        for name in self.checkpoint.names:
            parts = name.split(".")
            for length in range(max(1, len(parts) - 2), len(parts)):
                found[".".join(parts[:length])].add(".".join(parts[length:]))
        return found

    def _tied(self, module: str) -> tuple[Piece, ...] | None:
        """Head and input embeddings may be one tensor, which transformers saves once."""
        name = canonical(module)
        others = INPUT_EMBEDDINGS if name == HEAD else (*SHARED, HEAD) if name in SHARED else (HEAD,)
        known = name == HEAD or name in INPUT_EMBEDDINGS
        if not known or self.checkpoint.config is None or self.setting("tie_word_embeddings") is False:
            return None
        if name in {HEAD, *SHARED} and (shared := self.find("shared.weight")):
            return (Piece(shared),)  # the others are copies of it where they are on disk too
        found = {tensor for other in others if (tensor := self.find(f"{other}.weight"))}
        return (Piece(found.pop()),) if len(found) == 1 else None

    def _separate(self, module: str) -> tuple[Piece, ...] | None:
        """The module's own tensor, or those of the modules that it fuses."""
        if whole := self.find(f"{module}.weight"):
            return (Piece(whole),)
        return self._stacked(module)

    def _stacked(self, module: str) -> tuple[Piece, ...] | None:
        owner, _, leaf = module.rpartition(".")
        if leaf not in FUSED:
            return None
        found = [self.find(f"{owner}.{part}.weight") for part in FUSED[leaf]]
        pieces = tuple(Piece(tensor) for tensor in found if tensor is not None)
        return pieces if len(pieces) == len(found) else None

    def _fused(self, module: str) -> tuple[Piece, ...] | None:
        owner, _, leaf = module.rpartition(".")
        if leaf not in FUSED_IN:
            return None
        fused, index = FUSED_IN[leaf]
        tensor = self.find(f"{owner}.{fused}.weight")
        return (Piece(tensor, index=index, count=len(FUSED[fused])),) if tensor else None

    def _expert(self, module: str) -> tuple[Piece, ...] | None:
        """One expert's module where the checkpoint keeps all experts in one tensor."""
        match = EXPERT.fullmatch(canonical(f"{module}.weight").removesuffix(".weight"))
        if match is None:
            return None
        expert, leaf = int(match["index"]), match["leaf"]
        if tensor := self.find(f"{match['experts']}.{leaf}"):
            return (Piece(tensor, expert),)
        if leaf in FUSED_IN:
            fused, index = FUSED_IN[leaf]
            if tensor := self.find(f"{match['experts']}.{fused}"):
                return (Piece(tensor, expert, index, len(FUSED[fused])),)
        return None
