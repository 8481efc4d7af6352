"""A persona vector: of each block the mean response activation under prompts asking for a trait, minus that under opposite ones."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from safelora_fast.errors import CheckpointError, OutputError
from safelora_fast.files.json_reader import LIST, NUMBER, OBJECT, REAL, TEXT, check_fields, check_regular, parse_json
from safelora_fast.files.output import whole_file

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

FORMAT = "safelora_fast.persona"
VERSION = 1
VECTORS = "vectors"
WEAK = 0.75  # chance is 0.5
RULE = (
    "the largest effect among blocks {first} to {last}: those before a third of the depth still hold words, those after "
    "five sixths the next token"
)


@dataclass(frozen=True)
class Separation:
    """How well the vector of one block tells responses that it was not computed from.

    Attributes:
        effect: Cohen's d of their projections on the vector: difference of the two means over the pooled standard
            deviation. NaN where it is not known.
        share: share of them on their own side of the midpoint. NaN likewise.
    """

    effect: float
    share: float


@dataclass(frozen=True)
class PersonaVector:
    """One direction per block, not normalised (persona vectors, arXiv 2507.21509).

    Attributes:
        vectors: [blocks, hidden] float32; row ℓ belongs to the output of block ℓ, as `layer` of Steering counts them.
        trait: the trait's name.
        separation: of each block, on responses held out; empty where it was not measured.
        provenance: what it was made from: model, trait, settings, counts and versions, ready for JSON.
        origin: the file that it was read from, for messages.
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
        """Number of blocks."""
        return int(self.vectors.shape[0])

    @property
    def hidden(self) -> int:
        """Width of a block's output."""
        return int(self.vectors.shape[1])

    @property
    def name(self) -> str:
        """What messages call it: the file, or the trait."""
        return self.origin or f"the vector of {self.trait!r}"

    @property
    def candidates(self) -> range:
        """The blocks that a suggestion is chosen from: from a third to five sixths of the depth."""
        first = self.blocks // 3
        return range(first, max(5 * self.blocks // 6, first + 1))

    @property
    def suggestion(self) -> int | None:
        """The block with the largest held-out effect among the candidates; None where none was measured."""
        known = [
            block for block in self.candidates if self.separation and not math.isnan(self.separation[block].effect)
        ]
        return max(known, key=lambda block: self.separation[block].effect, default=None)

    @property
    def weak(self) -> bool:
        """Whether held-out responses are hardly told apart at the suggested block, or nothing is known of them."""
        return self.suggestion is None or self.separation[self.suggestion].share < WEAK

    @property
    def rule(self) -> str:
        """The rule behind the suggestion, in words."""
        return RULE.format(first=self.candidates[0], last=self.candidates[-1])

    def to_dict(self) -> dict[str, Any]:
        """What is known of it, a norm instead of each vector, for JSON; figures that are not known are None."""
        norms = np.linalg.norm(self.vectors.astype(np.float64), axis=1)
        figures = self.separation or [Separation(math.nan, math.nan)] * self.blocks
        return {
            "trait": self.trait,
            "blocks": [
                {"norm": float(norm), "effect": _known(one.effect), "share": _known(one.share)}
                for norm, one in zip(norms, figures, strict=True)
            ],
            "hidden": self.hidden,
            "suggestion": self.suggestion,
            "rule": self.rule,
            "provenance": dict(self.provenance),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, under a temporary name first.

        Raises:
            OutputError: the file cannot be written.
        """
        # One entry only: safetensors writes several in no fixed order, and the same vector must give the same bytes.
        document = {
            "version": VERSION,
            "trait": self.trait,
            "separation": [[_known(one.effect), _known(one.share)] for one in self.separation],
            "provenance": self.provenance,
        }
        metadata = {FORMAT: json.dumps(document, default=dict)}
        tensors = {VECTORS: np.ascontiguousarray(self.vectors, dtype=np.float32)}
        with whole_file(Path(path)) as partial:
            try:
                save_file(tensors, partial, metadata=metadata)
            except SafetensorError as error:
                raise OutputError(f"{path}: the vector cannot be written ({error}); nothing was kept") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PersonaVector:
        """Read a file that :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or no persona vector.
        """
        try:
            check_regular(path)
            with safe_open(path, framework="numpy") as file:
                document = check_fields(parse_json((file.metadata() or {}).get(FORMAT, "{}")), {})
                if document.get("version") != VERSION:
                    raise CheckpointError(
                        f"{path}: not a persona vector of version {VERSION} (safelora-fast persona extract)"
                    )
                vectors = file.get_tensor(VECTORS)
            if vectors.dtype != np.float32 or vectors.ndim != 2 or 0 in vectors.shape or not np.isfinite(vectors).all():
                raise ValueError(
                    f"{vectors.dtype} vectors of shape {vectors.shape}, none at all, or some that are not finite"
                )
            check_fields(document, {"separation": LIST, "trait": TEXT, "provenance": OBJECT})
            separation = [_separation(number, figures) for number, figures in enumerate(document["separation"])]
            if len(separation) not in {0, len(vectors)}:
                raise ValueError(f"figures of {len(separation)} blocks beside {len(vectors)} vectors")
            trait, provenance = document["trait"], document["provenance"]
            check_fields(provenance, {}, dict.fromkeys(("model", "trait", "settings", "counts"), OBJECT))
            for name, kind in (("settings", NUMBER), ("counts", OBJECT)):
                values = provenance.get(name) or {}
                check_fields(values, {}, dict.fromkeys(values, kind))
            return cls(vectors, trait, separation, provenance, str(path))
        except (OSError, SafetensorError, ValueError, TypeError) as error:  # TypeError: a dtype that numpy lacks
            raise CheckpointError(f"{path}: the persona vector cannot be read ({error})") from error


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _is_figure(value: Any) -> bool:
    return value is None or REAL.fits(value)


def _separation(block: int, figures: Any) -> Separation:
    if not (isinstance(figures, list) and len(figures) == 2 and all(map(_is_figure, figures))):
        raise ValueError(f"the separation of block {block} must be two numbers, or null for what is not known")
    effect, share = (math.nan if value is None else float(value) for value in figures)
    return Separation(effect, share)
