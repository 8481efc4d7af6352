"""Feature distance to the reference model (LDIFS)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from safelora_fast.defenses.base import BatchDefense, Observation
from safelora_fast.defenses.step_cost import Extra
from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from safelora_fast.data.spans import Spans, Tokens
    from safelora_fast.defenses.step_cost import Shape, Work
    from safelora_fast.models.anatomy import Anatomy

Normalize = Literal["sequence", "token", "none"]


class FeatureDistance(BatchDefense):
    """λ · mean over sequences of the squared distance between the layer outputs of the model and the reference model.

    LDIFS as defined by Kaczér et al. (arXiv 2508.06249), differentiable. In packed rows each document is a sequence.

    Args:
        weight: λ; 1.0 in the paper.
        layers: number of evenly spaced layers, including the first and the last (5 in the paper); "every:N" for
            layers 0, N, 2N and so on; or a list of layer indices, where negative indices count from the end.
        normalize: what is normalized to unit length first: each flattened "sequence" of a layer (as in the paper),
            each "token", or "none".
        tokens: which tokens count: "all" (except padding), "completion" (tokens that predict a completion token), or
            "safe" (tokens of safe examples, see :func:`~safelora_fast.interleave`).
        sample: share of these examples that is drawn at each optimizer step, above 0. The others cost no reference pass.
            The term is divided by it, so that its expected value and gradient are those of all examples.

    Raises:
        SettingsError: a setting is out of range.
    """

    name: ClassVar[str] = "feature_distance"

    def __init__(
        self,
        weight: float = 1.0,
        layers: int | str | Sequence[int] = 5,
        normalize: Normalize = "sequence",
        tokens: Tokens = "all",
        sample: float = 1.0,
    ) -> None:
        super().__init__(weight, tokens, sample)
        if normalize not in {"sequence", "token", "none"}:
            raise SettingsError(f'FeatureDistance: normalize is {normalize!r}, not "sequence", "token" or "none"')
        if isinstance(layers, str):
            _every(layers)
        elif isinstance(layers, int):
            if layers < 1 or isinstance(layers, bool):
                raise SettingsError(f"FeatureDistance: layers is {layers}, it must be at least 1")
        elif not layers or len(set(layers)) != len(layers):
            raise SettingsError("FeatureDistance: layers must name at least one layer, and none twice")
        self.layers = layers if isinstance(layers, int | str) else list(layers)
        self.normalize: Normalize = normalize

    def __repr__(self) -> str:
        return (
            f"FeatureDistance(weight={self.weight}, layers={self.layers!r}, normalize={self.normalize!r}, "
            f"tokens={self.tokens!r}, sample={self.sample})"
        )

    def recorded_layers(self, anatomy: Anatomy) -> list[int]:
        """Return the indices of the compared layers in ascending order."""
        anatomy.check_outputs(owner="FeatureDistance")
        depth = anatomy.depth
        if isinstance(self.layers, str):
            return list(range(0, depth, _every(self.layers)))
        if isinstance(self.layers, int):
            return evenly_spaced(depth, self.layers)
        chosen = [anatomy.layer(index, owner="FeatureDistance") for index in self.layers]
        if len(set(chosen)) != len(chosen):
            raise SettingsError(f"FeatureDistance: layers {self.layers} name one of the {depth} layers twice")
        return sorted(chosen)

    def units(self, spans: Spans) -> int:
        """Return the number of sequences."""
        return spans.sequences(self.mask(spans))

    def loss(self, observation: Observation) -> torch.Tensor:
        """Return the distance summed over sequences and layers."""
        from safelora_fast.ops import feature_distance

        spans, mask = observation.spans, self.mask(observation.spans)
        layers = self.recorded_layers(observation.anatomy)
        mean = feature_distance(
            [observation.student.layers[index] for index in layers],
            [observation.reference.layers[index] for index in layers],
            mask,
            normalize=self.normalize,
            segments=spans.segments,
        )
        return mean * spans.sequences(mask)

    def cost(self, shape: Shape, work: Work) -> Extra:
        """Estimate the cost of two reads of the compared outputs."""
        if isinstance(self.layers, str):
            count = -(-shape.layers // _every(self.layers))
        else:
            count = min(self.layers, shape.layers) if isinstance(self.layers, int) else len(self.layers)
        values = count * shape.hidden
        words = f"reference pass, and two reads of the outputs of {count} layers"
        return Extra(
            16.0 * values * self.sample * work.tokens, 3 * values * work.micro_tokens * shape.value_bytes, words
        )


def evenly_spaced(depth: int, count: int) -> list[int]:
    """Return the indices of `count` evenly spaced layers out of `depth`: linspace(0, depth - 1, count), truncated.

    Raises:
        SettingsError: `count` exceeds `depth`.
    """
    if count > depth:
        raise SettingsError(f"FeatureDistance: {count} layers are asked for, the model has {depth}")
    if count == 1:
        return [0]
    return [index * (depth - 1) // (count - 1) for index in range(count)]


def _every(layers: str) -> int:
    word, _, number = layers.partition(":")
    if word != "every" or not number.isdecimal() or int(number) < 1:
        raise SettingsError(f'FeatureDistance: layers is {layers!r}: give a number, "every:N" or a list of layers')
    return int(number)
