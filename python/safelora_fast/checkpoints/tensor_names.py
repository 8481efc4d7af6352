"""Names of tensors: their spellings, the wrappers at their front, and the tower of the model that they belong to."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

WRAPPERS = {"base_model", "model", "language_model", "text_model", "transformer", "backbone"}

# Spellings on disk against those of the loaded model (transformers' conversion mappings), after the wrappers are off.
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

NEVER_LOADED = {"mtp"}  # layers that predict further tokens; no class of transformers has them

# Words of towers in the names of modules and of classes.
TOWERS = {
    "vision": ("vision", "visual", "image"),
    "audio": ("audio", "speech", "sound"),
    "multimodal": ("multimodal",),
    "text": ("text", "language"),
}
TOWER_CLASS = re.compile(r".*(Vision|Image|Audio|Speech|Multimodal|Text)(Model|Transformer|Encoder)(WithProjection)?")
LANGUAGE_TASKS = {"CAUSAL_LM", "SEQ_2_SEQ_LM"}  # PEFT refuses them for a model that cannot generate


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor, or of one expert in it: all of them, or part `index` of `count` fused parts.

    `rows` (first, count) and `transposed` (kept as (in, out)) are set where transformers tells how it loads the tensor.
    """

    tensor: str
    expert: int | None = None
    index: int = 0
    count: int = 1
    rows: tuple[int, int] | None = None
    transposed: bool | None = None


def canonical(name: str) -> str:
    """A tensor's name in one spelling, without the wrappers at its front."""
    return _spelled(_split(name)[1])


def matching(module: str, patterns: Sequence[str]) -> str | None:
    """The first pattern that a module's name, or its last components, match as file names do; or None."""
    ends = (pattern for pattern in patterns if fnmatch.fnmatchcase(f".{module}", f"*.{pattern}"))
    return next(ends, None)


def tower_of(config: Mapping[str, Any]) -> str | None:
    """The tower that an adapter's modules belong to by its configuration, or None."""
    mapping = config.get("auto_mapping")
    name = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
    return tower_of_class(name) or ("text" if config.get("task_type") in LANGUAGE_TASKS else None)


def tower_of_class(name: str) -> str | None:
    """The tower that a class of models is by its name; None for whole models and other names."""
    if match := TOWER_CLASS.fullmatch(name):
        return _tower(match[1])
    return "text" if name.endswith("ForCausalLM") else None


class NameIndex:
    """Names that can be found in other forms."""

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
        """All names that a name may mean: itself alone if it is there.

        Otherwise names that differ by wrappers or spelling, and names within a part of the model (`vision_model.` before the
        whole name). Names within a tower count only if that tower is meant.

        Args:
            name: a name of the loaded model.
            tower: its tower if its wrappers do not tell (:func:`tower_of`).
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
    """The wrappers at the front of a name, and the rest, which is never empty."""
    parts, count = name.split("."), 0
    while count < len(parts) - 1 and parts[count] in WRAPPERS:
        count += 1
    return ".".join(parts[:count]), ".".join(parts[count:])


def _spelled(name: str) -> str:
    for pattern, replacement in SPELLINGS:
        name = pattern.sub(replacement, name)
    return name


def _tower(words: str) -> str | None:
    """The tower that a prefix of names, or a word of a class, names."""
    words = words.lower()
    return next((tower for tower, known in TOWERS.items() if any(word in words for word in known)), None)
