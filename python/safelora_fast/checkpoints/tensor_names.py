"""Tensor names: their spellings, their leading wrappers, and the tower of the model that they belong to."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

WRAPPERS = {"base_model", "model", "language_model", "text_model", "transformer", "backbone"}

# Spellings on disk and in the loaded model (transformers' conversion mappings), without leading wrappers.
SPELLINGS = (
    (re.compile(r"\.block_sparse_moe\.input_linear(\.weight)?$"), ".mlp.experts.gate_up_proj"),
    (re.compile(r"\.block_sparse_moe\.output_linear(\.weight)?$"), ".mlp.experts.down_proj"),
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"(?<=\.experts)\.fc1\.weight$"), ".gate_up_proj"),
    (re.compile(r"(?<=\.experts)\.fc2\.weight$"), ".down_proj"),
    (re.compile(r"(\.experts\.\d+)\.w1\."), r"\1.gate_proj."),
    (re.compile(r"(\.experts\.\d+)\.w2\."), r"\1.down_proj."),
    (re.compile(r"(\.experts\.\d+)\.w3\."), r"\1.up_proj."),
    (re.compile(r"^embed_out\."), "lm_head."),
)

NEVER_LOADED = {"mtp"}  # layers that predict further tokens; no transformers class loads them

# Words that identify a tower in module and class names.
TOWERS = {
    "vision": ("vision", "visual", "image"),
    "audio": ("audio", "speech", "sound"),
    "multimodal": ("multimodal",),
    "text": ("text", "language"),
}
TOWER_CLASS = re.compile(r".*(Vision|Image|Audio|Speech|Multimodal|Text)(Model|Transformer|Encoder)(WithProjection)?")
LANGUAGE_TASKS = {"CAUSAL_LM", "SEQ_2_SEQ_LM"}  # PEFT rejects these tasks for a model that cannot generate


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor, or of one expert in it: all rows, or part `index` of `count` fused parts.

    `rows` (first, count) and `transposed` (stored as (in, out)) are set only if transformers' conversion table defines
    them.
    """

    tensor: str
    expert: int | None = None
    index: int = 0
    count: int = 1
    rows: tuple[int, int] | None = None
    transposed: bool | None = None


def canonical(name: str) -> str:
    """Return a tensor's name in its canonical spelling, without leading wrappers."""
    return _spelled(_split(name)[1])


def matching(module: str, patterns: Sequence[str]) -> str | None:
    """Return the first glob pattern that matches a module's name or its last components, or None."""
    ends = (pattern for pattern in patterns if fnmatch.fnmatchcase(f".{module}", f"*.{pattern}"))
    return next(ends, None)


def tower_of(config: Mapping[str, Any]) -> str | None:
    """Return the tower that an adapter's modules belong to, from the adapter's configuration, or None."""
    mapping = config.get("auto_mapping")
    name = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
    return tower_of_class(name) or ("text" if config.get("task_type") in LANGUAGE_TASKS else None)


def tower_of_class(name: str) -> str | None:
    """Return the tower that a model class implements, from the class name; None for whole models and other names."""
    if match := TOWER_CLASS.fullmatch(name):
        return _tower(match[1])
    return "text" if name.endswith("ForCausalLM") else None


class NameIndex:
    """An index of tensor names that also finds other spellings."""

    def __init__(self, names: Iterable[str]) -> None:
        self.by_canonical: dict[str, list[str]] = defaultdict(list)
        self._names = dict.fromkeys(names)
        self._roots: set[str] = set()
        for name in self._names:
            self.by_canonical[canonical(name)].append(name)
            parts = name.split(".")
            for length in range(1, len(parts)):
                if parts[length - 1].isdigit() or parts[0] in NEVER_LOADED:
                    break
                if not WRAPPERS.issuperset(parts[:length]):
                    self._roots.add(".".join(parts[:length]))

    def find(self, name: str, tower: str | None = None) -> list[str]:
        """Return all tensors that a name may refer to. If the name itself is present, return only that.

        Otherwise the result has names that differ in wrappers or spelling, and names inside a part of the model
        (`vision_model.` before the whole name). Names inside a tower match only if that tower is meant.

        Args:
            name: a name in the loaded model.
            tower: the tower, if the wrappers of the name do not give it (:func:`tower_of`).
        """
        if name in self._names:
            return [name]
        wrappers, rest = _split(name)
        within = [f"{root}.{name}" for root in self._roots if f"{root}.{name}" in self._names]
        found = {tensor: _tower(_split(tensor)[0]) for tensor in self.by_canonical.get(_spelled(rest), [])}
        found |= {tensor: _tower(tensor.removesuffix(name)) for tensor in within}
        if (meant := _tower(wrappers) or tower) is not None:
            found = {tensor: of for tensor, of in found.items() if of in {meant, None}}
            if meant in found.values():
                found = {tensor: of for tensor, of in found.items() if of == meant}
        return list(found)


def _split(name: str) -> tuple[str, str]:
    """Split a name into its leading wrappers and the rest, which is never empty."""
    parts, count = name.split("."), 0
    while count < len(parts) - 1 and parts[count] in WRAPPERS:
        count += 1
    return ".".join(parts[:count]), ".".join(parts[count:])


def _spelled(name: str) -> str:
    for pattern, replacement in SPELLINGS:
        name = pattern.sub(replacement, name)
    return name


def _tower(words: str) -> str | None:
    """Return the tower that a name prefix or a word of a class name refers to."""
    words = words.lower()
    return next((tower for tower, known in TOWERS.items() if any(word in words for word in known)), None)
