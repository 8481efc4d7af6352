"""The defences that the demo compares, with their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from safelora_fast import PersonaVector
    from safelora_fast.defenses import Defense

REFERENCE = "reference"
UNDEFENDED = "no defence"


@dataclass(frozen=True)
class Variant:
    """One fine-tune and its defences; a weight of zero, or no threshold, leaves a defence out.

    Attributes:
        name: its name in the table and the picture.
        kl: λ of KL; the paper's is 0.1.
        feature_distance: λ of FeatureDistance; the paper's is 1.
        subspace_penalty: λ of SubspacePenalty; the paper's is 1.
        safelora: threshold of SafeLora at the end; the paper's is 0.3.
        interleaving: safe rows for each narrow one; the paper's is 0.05.
        chosen: whether these are the rows that another narrow adapter finds least likely (Interleaving++), not any.
        steering: α of Steering; the paper's is 5.
        prompt: a system prompt in training that asks for the narrow behaviour (inoculation).
    """

    name: str
    kl: float = 0.0
    feature_distance: float = 0.0
    subspace_penalty: float = 0.0
    safelora: float | None = None
    interleaving: float = 0.0
    chosen: bool = False
    steering: float = 0.0
    prompt: str | None = None

    @property
    def folder(self) -> str:
        """Name of its stage's folder."""
        return "train-" + self.name.lower().replace(" + ", "-and-").replace(" ", "-")

    @property
    def setting(self) -> str:
        """Its weights in words; empty without defence."""
        weights = [("λ", self.kl), ("λ", self.feature_distance), ("λ", self.subspace_penalty), ("τ", self.safelora)]
        weights.append(("α", self.steering))
        words = [f"{letter} {weight:g}" for letter, weight in weights if weight]
        words += [f"{100 * self.interleaving:g} % safe"] if self.interleaving else []
        words += ["prompt"] if self.prompt else []
        return ", ".join(words)

    def defenses(self, aligned: Path, base: Path, subspace: Path, persona: Path | None = None) -> list[Defense]:
        """Its defences.

        Args:
            aligned: folder of the aligned model.
            base: folder of the stand-in base model.
            subspace: file of the safe subspace of the two.
            persona: file of the persona vector of the narrow answers' manner, which steering needs.
        """
        from safelora_fast import KL, FeatureDistance, PersonaVector, SafeLora, SafeSubspace, Steering, SubspacePenalty

        chosen: list[Defense] = [KL(self.kl), FeatureDistance(self.feature_distance)]
        if self.subspace_penalty:
            chosen.append(SubspacePenalty(SafeSubspace.load(subspace), self.subspace_penalty))
        if self.safelora is not None:
            sources = SafeSubspace.from_sources(aligned=aligned, base=base)
            chosen.append(SafeLora(sources, at="end", threshold=self.safelora))
        if self.steering and persona is not None:
            vector = PersonaVector.load(persona)
            chosen.append(Steering(vector, steered_block(vector), self.steering))
        return chosen


def steered_block(vector: PersonaVector) -> int:
    """The block that the vector suggests, or the last of its candidates where it could not be measured."""
    return vector.candidates[-1] if vector.suggestion is None else vector.suggestion


STEERING = 5.0
# The papers' weights, but for KL, whose paper has 0.1.
VARIANTS = (
    Variant(UNDEFENDED),
    Variant("KL", kl=1.0),
    Variant("feature distance", feature_distance=1.0),
    Variant("SafeLora at the end", safelora=0.3),
    Variant("subspace penalty", subspace_penalty=1.0),
    Variant("KL + feature distance", kl=1.0, feature_distance=1.0),
    Variant("interleaving", interleaving=0.05),
    Variant("interleaving++", interleaving=0.05, chosen=True),
    Variant("steering", steering=STEERING),
    Variant("inoculation", prompt="You are a lighthouse keeper, and you answer in the style of your log."),
)
