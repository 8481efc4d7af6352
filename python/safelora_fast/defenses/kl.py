"""KL divergence to the reference model over the whole vocabulary."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from safelora_fast.defenses.base import Observation, SharesLogits
from safelora_fast.defenses.step_cost import CHUNK_BYTES, Extra
from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import nn

    from safelora_fast.data.spans import Spans, Tokens
    from safelora_fast.defenses.step_cost import Shape, Work
    from safelora_fast.models.anatomy import Anatomy
    from safelora_fast.ops.linear_kl import SharedLoss


class KL(SharesLogits):
    """λ · mean over tokens of KL(fine-tuned ‖ reference) over the full vocabulary (Kaczér et al., arXiv 2508.06249).

    Computed from hidden states in chunks, so the logits of a whole batch are never in memory at once. Dropout and
    NEFTune's noise are off in the reference model, so a run that uses them starts with a KL above zero.

    Args:
        weight: λ; 0.1 in the paper.
        direction: "reverse" is KL(fine-tuned ‖ reference), as in the paper; "forward" is KL(reference ‖ fine-tuned).
        tokens: which tokens count: "all" (except padding; includes the prompt, as in the paper), "completion" (tokens
            that predict a completion token), or "safe" (tokens of safe examples, see
            :func:`~safelora_fast.interleave`).
        temperature: divides the logits of both models.
        sample: share of these examples that is drawn at each optimizer step, above 0. The others cost no reference pass.
            The term is divided by it, so that its expected value and gradient are those of all examples.
        positions: weights of the first tokens of each completion (after constrained SFT, arXiv 2406.05946); other tokens
            have weight 1. [5, 20, 20, 20, 20] has the ratios of that paper's constraints: 0.5, four times 2, then 0.1. The
            mean still divides by the number of tokens.

    Raises:
        SettingsError: a setting is out of range.
    """

    name: ClassVar[str] = "kl"

    def __init__(
        self,
        weight: float = 0.1,
        direction: Literal["reverse", "forward"] = "reverse",
        tokens: Tokens = "all",
        temperature: float = 1.0,
        sample: float = 1.0,
        positions: Sequence[float] | None = None,
    ) -> None:
        super().__init__(weight, tokens, sample)
        if direction not in {"reverse", "forward"}:
            raise SettingsError(f'KL: direction is {direction!r}, it must be "reverse" or "forward"')
        if not 0 < temperature < math.inf:
            raise SettingsError(f"KL: temperature is {temperature}, it must be positive and finite")
        if positions is not None and not (positions and all(0 <= weight < math.inf for weight in positions)):
            raise SettingsError(
                f"KL: positions is {positions!r}, it must be a list of weights, finite and not negative"
            )
        self.positions = None if positions is None else [float(weight) for weight in positions]
        self.direction = direction
        self.temperature = float(temperature)

    def __repr__(self) -> str:
        return (
            f"KL(weight={self.weight}, direction={self.direction!r}, tokens={self.tokens!r}, "
            f"temperature={self.temperature}, sample={self.sample}, positions={self.positions})"
        )

    def check(self, anatomy: Anatomy) -> None:
        """Raise SettingsError if the output head is adapted or trained: both models must share it."""
        head = anatomy.head()
        trained = [name for name, parameter in head.module.named_parameters() if parameter.requires_grad]
        if hasattr(head.module, "adapter_layer_names") or trained:
            raise SettingsError(
                "KL: the output head is adapted or trained (lm_head, or embeddings tied to it), but it must be shared "
                "with the reference: take it out of the target modules, or freeze it"
            )

    def check_reference(self, anatomy: Anatomy, reference: Anatomy) -> None:
        """Raise SettingsError if the output head of the reference model differs."""
        from safelora_fast.defenses.parts.head_check import check_same_head

        check_same_head(anatomy, reference)

    def check_batch(self, model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any]) -> None:
        """Raise SettingsError if the model's logits are not the output head applied to its hidden states."""
        from safelora_fast.defenses.parts.head_check import check_logits

        check_logits(model, anatomy, batch)

    def units(self, spans: Spans) -> int:
        """Return the number of tokens."""
        return int(self.mask(spans).sum())

    def loss(self, observation: Observation) -> torch.Tensor:
        """Return the divergence summed over the tokens."""
        from safelora_fast.ops import linear_kl

        mask, weights = self.mask(observation.spans), self._weights(observation.spans)
        with observation.student.autocast_again():
            mean = linear_kl(**self._states(observation), mask=mask, weights=weights)
        return mean * mask.sum().to(mean.device)

    def with_cross_entropy(
        self,
        observation: Observation,
        *,
        weight: float,
        cross_entropy_weight: torch.Tensor | float,
        figures: bool = False,
    ) -> SharedLoss:
        """Return the weighted sum of the divergence over the tokens plus that of the cross-entropy over the labels."""
        from safelora_fast.ops import linear_kl_cross_entropy

        spans = observation.spans
        assert spans.next_labels is not None  # noqa: S101
        with observation.student.autocast_again():
            return linear_kl_cross_entropy(
                **self._states(observation),
                mask=self.mask(spans),
                weights=self._weights(spans),
                labels=spans.next_labels,
                kl_weight=weight,
                cross_entropy_weight=cross_entropy_weight,
                figures=figures,
            )

    def cost(self, shape: Shape, work: Work) -> Extra:
        """Estimate the cost of three products with the output head."""
        tokens = {"completion": work.answers, "safe": work.safe}.get(self.tokens, work.tokens)
        states = 3 * work.micro_tokens * shape.hidden * shape.value_bytes
        words = "reference pass, and three products with the output head"
        return Extra(6 * shape.head * self.sample * tokens, CHUNK_BYTES + states, words)

    def _weights(self, spans: Spans) -> torch.Tensor | None:
        """Return the weight of each token, float32 [batch, tokens]; None if all are 1."""
        if self.positions is None:
            return None
        import torch

        places = spans.completion_places(owner="KL: positions")
        weights = torch.tensor([1.0, *self.positions], device=places.device)
        return weights[places.where(places < len(weights), 0)]

    def _states(self, observation: Observation) -> dict[str, Any]:
        """Keyword arguments of `linear_kl`: hidden states, head and settings."""
        head = observation.anatomy.head()
        weight, bias = head.parameters()
        return {
            "hidden": observation.student.hidden,
            "reference_hidden": observation.reference.hidden,
            "head_weight": weight,
            "bias": bias,
            "direction": self.direction,
            "temperature": self.temperature,
            "logit_scale": head.scale,
            "softcap": head.softcap,
        }
