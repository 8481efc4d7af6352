"""Anchor of the attention's keys and values at the tokens of the chat template (TReFT)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from safelora_fast.defenses.base import BatchDefense, Observation, Run
from safelora_fast.defenses.step_cost import Extra
from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from safelora_fast.data.spans import Spans
    from safelora_fast.defenses.parts.prefix_records import PrefixRecords
    from safelora_fast.defenses.step_cost import Shape, Work
    from safelora_fast.models.anatomy import Anatomy


class TemplateAnchor(BatchDefense):
    """λ · mean over sequences and layers of ‖k − k₀‖²/‖k₀‖² + ‖v − v₀‖²/‖v₀‖² at template tokens (arXiv 2606.06667).

    k and v are the keys and values of the attention, with all heads of keys together: after the projection and, where
    the model has one, the normalization, before rotary embedding. k₀ and v₀ are those of the reference model. They
    depend on the tokens up to there alone, so they are recorded once for each distinct prefix, and later steps run no
    reference pass. In each sequence (in packed rows, each document) it is the mean over the template's tokens.

    The code published with the paper applies the key projection to the layer's input before its norm; this is the
    quantity of the paper.

    Args:
        weight: λ; 1 to 30 in the paper, usually 10, with small learning rates (5e-6 to 3e-5).
        tokens: "prefix" is everything before the user's first text: system turn and user header (the paper's choice for
            Qwen2.5, Llama 3.1 and GPT-OSS). "header" is each assistant header (for Qwen3); its keys depend on the prompt,
            so the first pass over the data runs the reference on every new prompt.
        layers: "all", or a list of layer indices, where negative indices count from the end.

    Raises:
        SettingsError: a setting is out of range.
    """

    name: ClassVar[str] = "template_anchor"
    keeps_reference: ClassVar[bool] = True
    token_choices: ClassVar[tuple[str, ...]] = ("prefix", "header")

    def __init__(
        self,
        weight: float = 10.0,
        tokens: Literal["prefix", "header"] = "prefix",
        layers: Literal["all"] | Sequence[int] = "all",
    ) -> None:
        super().__init__(weight, tokens)
        if isinstance(layers, str | int):
            if layers != "all":
                raise SettingsError(
                    f'TemplateAnchor: layers is {layers!r}, it must be "all" or a list of layer indices'
                )
        elif not layers or len(set(layers)) != len(layers):
            raise SettingsError("TemplateAnchor: layers must name at least one layer, and none twice")
        self.layers: Literal["all"] | list[int] = "all" if isinstance(layers, str) else list(layers)

    def __repr__(self) -> str:
        return f"TemplateAnchor(weight={self.weight}, tokens={self.tokens!r}, layers={self.layers!r})"

    def check(self, anatomy: Anatomy) -> None:
        """Raise SettingsError for latent attention, which caches no keys, and for layers that do not exist."""
        if getattr(anatomy.config, "kv_lora_rank", None):
            raise SettingsError(
                f"TemplateAnchor: {type(anatomy.model).__name__} has latent attention (MLA), whose keys are not the output of a "
                "module: use KL"
            )
        self._indices(anatomy)

    def attach(self, run: Run) -> PrefixRecords:
        """Return the records of the reference's keys and values."""
        from safelora_fast.defenses.parts.prefix_records import PrefixRecords
        from safelora_fast.models.anatomy import dissect

        layers, late = self._indices(dissect(run.model)), self.tokens == "header"
        return PrefixRecords(run.model, self.mask, layers=layers, after_prompts=late, owner="TemplateAnchor")

    def units(self, spans: Spans) -> int:
        """Return the number of sequences that have such tokens."""
        return spans.sequences(self.mask(spans))

    def loss(self, observation: Observation) -> torch.Tensor:
        """Return the distance summed over sequences."""
        from safelora_fast.defenses.parts.prefix_records import PrefixRecords

        assert isinstance(observation.attached, PrefixRecords)  # noqa: S101
        return observation.attached.loss(observation)

    def reference_share(self, work: Work) -> float:
        """Estimate the share of a step's tokens in rows with a new prefix: none, or with "header" those of the first epoch."""
        return 0.0 if self.tokens == "prefix" else 1 / max(work.epochs, 1)

    def cost(self, shape: Shape, work: Work) -> Extra:
        """Estimate the cost of reading the keys and values, if all of a prompt were template tokens."""
        count = shape.layers if self.layers == "all" else len(self.layers)
        values = 2.0 * count * shape.attention
        prompts = 1 - work.answers / max(work.tokens, 1)
        words = f"keys and values of template tokens in {count} layers"
        words += "; one reference pass for each new prefix" if self.tokens == "prefix" else ""
        memory = 3 * values * prompts * work.micro_tokens * shape.value_bytes
        return Extra(12 * values * prompts * work.tokens, memory, words)

    def _indices(self, anatomy: Anatomy) -> list[int] | None:
        """Return the layers' indices; None for all of them."""
        if self.layers == "all":
            return None
        chosen = [anatomy.layer(index, owner="TemplateAnchor") for index in self.layers]
        if len(set(chosen)) != len(chosen):
            raise SettingsError(f"TemplateAnchor: layers {self.layers} name one of the {anatomy.depth} layers twice")
        return sorted(chosen)
