"""A persona vector: for each layer, the mean activation of responses that show a trait minus that of opposite ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from safelora_fast.files.json_reader import LIST, NUMBER, OBJECT, REAL, TEXT, check_fields
from safelora_fast.files.tensor_file import TensorFile

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

FILE = TensorFile("safelora_fast.persona", 1, "persona vector", "safelora-fast persona extract")
VECTORS = "vectors"
WEAK = 0.75  # share of held-out responses on their own side; chance is 0.5


@dataclass(frozen=True)
class Separation:
    """How well the vector of one layer separates held-out responses; NaN if unknown.

    Attributes:
        effect: Cohen's d of their projections on the vector: difference of the means over the pooled standard
            deviation.
        share: share of the responses that are on their own side of the midpoint.
    """

    effect: float
    share: float


@dataclass(frozen=True)
class PersonaVector:
    """One direction per layer, not normalized (persona vectors, arXiv 2507.21509).

    Attributes:
        vectors: [layers, hidden] float32; row ℓ belongs to the output of layer ℓ, numbered like `layer` of Steering.
        trait: the name of the trait.
        separation: one for each layer, on held-out responses; empty if it was not measured.
        provenance: model, trait, settings, counts and versions, ready for JSON.
        origin: the file that the vector was read from, for messages.
    """

    vectors: np.ndarray
    trait: str
    separation: Sequence[Separation] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    origin: str | None = None

    def __repr__(self) -> str:
        origin = "" if self.origin is None else f", origin={self.origin!r}"
        return f"PersonaVector({self.trait!r}, {self.blocks} blocks of {self.hidden}{origin})"

    @property
    def blocks(self) -> int:
        """Number of layers."""
        return int(self.vectors.shape[0])

    @property
    def hidden(self) -> int:
        """Width of a layer's output."""
        return int(self.vectors.shape[1])

    @property
    def name(self) -> str:
        """The name in messages: the file, or the trait."""
        return self.origin or f"the vector of {self.trait!r}"

    @property
    def candidates(self) -> range:
        """The layers that a suggestion is chosen from: from one third to five sixths of the depth."""
        first = self.blocks // 3
        return range(first, max(5 * self.blocks // 6, first + 1))

    @property
    def suggestion(self) -> int | None:
        """The candidate with the largest held-out effect; None if no effect is known."""
        effects = {layer: self.separation[layer].effect for layer in self.candidates if self.separation}
        return max(
            (layer for layer in effects if not math.isnan(effects[layer])), key=effects.__getitem__, default=None
        )

    @property
    def weak(self) -> bool:
        """Whether the suggested layer hardly separates held-out responses, or no layer is suggested."""
        return self.suggestion is None or self.separation[self.suggestion].share < WEAK

    @property
    def rule(self) -> str:
        """The rule behind the suggestion, in words."""
        return (
            f"the largest effect among layers {self.candidates[0]} to {self.candidates[-1]}: those before a third of the depth "
            "still hold words, those after five sixths the next token"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the vector for JSON: norms instead of vectors, and None for unknown values."""
        norms = np.linalg.norm(self.vectors.astype(np.float64), axis=1)
        known = self.separation or [Separation(math.nan, math.nan)] * self.blocks
        return {
            "trait": self.trait,
            "blocks": [
                {"norm": float(norm), "effect": _known(one.effect), "share": _known(one.share)}
                for norm, one in zip(norms, known, strict=True)
            ],
            "hidden": self.hidden,
            "suggestion": self.suggestion,
            "rule": self.rule,
            "provenance": dict(self.provenance),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file atomically.

        Raises:
            OutputError: the file cannot be written.
        """
        separation = [[_known(one.effect), _known(one.share)] for one in self.separation]
        document = {"trait": self.trait, "separation": separation, "provenance": self.provenance}
        FILE.save(path, {VECTORS: self.vectors}, document)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PersonaVector:
        """Read a file that :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or not a persona vector.
        """
        with FILE.opened(path) as (document, file):
            vectors = file.get_tensor(VECTORS)
            if vectors.dtype != np.float32 or vectors.ndim != 2 or 0 in vectors.shape or not np.isfinite(vectors).all():
                raise ValueError(
                    f"{vectors.dtype} vectors of shape {vectors.shape}, none at all, or some that are not finite"
                )
            check_fields(document, {"separation": LIST, "trait": TEXT, "provenance": OBJECT})
            separation = [_separation(number, values) for number, values in enumerate(document["separation"])]
            if len(separation) not in {0, len(vectors)}:
                raise ValueError(f"the separation of {len(separation)} layers beside {len(vectors)} vectors")
            provenance = document["provenance"]
            check_fields(provenance, {}, dict.fromkeys(("model", "trait", "settings", "counts"), OBJECT))
            for name, kind in (("settings", NUMBER), ("counts", OBJECT)):
                values = provenance.get(name) or {}
                check_fields(values, {}, dict.fromkeys(values, kind))
            return cls(vectors, document["trait"], separation, provenance, str(path))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _separation(layer: int, values: Any) -> Separation:
    if not (LIST.fits(values) and len(values) == 2 and all(value is None or REAL.fits(value) for value in values)):
        raise ValueError(f"the separation of layer {layer} must be two numbers, or null for what is not known")
    return Separation(*(math.nan if value is None else float(value) for value in values))
