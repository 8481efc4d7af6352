"""What a step costs, and what each defence adds: arithmetic on shapes. Every figure is an estimate.

Matrix products and attention are counted, at two operations a multiply-add; norms, activations, the optimiser and padding
are not. The frozen weights get no gradient, so backward costs one product a weight where full fine-tuning costs two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from safelora_fast.defenses.step_cost import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.defenses.step_cost import Extra, Shape, Work
    from safelora_fast.recipe.defense_section import DefenseSpec


@dataclass(frozen=True)
class Cost:
    """Estimates for a whole step.

    Attributes:
        step: operations of an undefended step.
        reference: operations of the reference passes, which defences share.
        extras: by defence.
        memory: bytes by what they are for.
    """

    step: float
    reference: float
    extras: dict[str, Extra]
    memory: dict[str, float] = field(default_factory=dict)

    @property
    def defended(self) -> float:
        """Operations of a defended step."""
        return self.step + self.reference + sum(extra.flops for extra in self.extras.values())


def estimate(shape: Shape, work: Work, specs: Sequence[DefenseSpec]) -> Cost:
    """The cost of a step with these defences."""
    specs = [spec for spec in specs if switched_on(spec)]
    attention = 2 * shape.layers * shape.attention * work.squares
    blocks = 2 * (shape.matrices + shape.adapter) * work.tokens + attention
    head = 2 * shape.head * work.head_tokens
    backward = (2 * shape.matrices + 4 * shape.adapter) * work.tokens + 2 * attention + head
    step = blocks + head + backward + (blocks if work.checkpointing else 0)
    needs_reference = any(spec.kind.needs_reference for spec in specs)
    reference = 2 * shape.matrices * work.tokens + attention if needs_reference else 0.0
    extras = {spec.name: spec.outline.cost(shape, work) for spec in specs}
    return Cost(step, reference, extras, _memory(shape, work, extras))


def switched_on(spec: DefenseSpec) -> bool:
    """Whether its settings leave it on: a weight or a coefficient of 0 costs nothing."""
    return spec.outline.active


def _memory(shape: Shape, work: Work, extras: dict[str, Extra]) -> dict[str, float]:
    per_token = 10 * shape.hidden + 4 * shape.attention + 4 * shape.inner
    block = work.micro_tokens * per_token * shape.value_bytes
    inputs = shape.layers * work.micro_tokens * shape.hidden * shape.value_bytes
    return {
        "weights": shape.weight_bytes,
        "adapter, its gradient and optimiser": shape.adapter * (8 + work.optimizer_bytes),
        "activations": inputs + block if work.checkpointing else shape.layers * block,
        "logits": min(CHUNK_BYTES, 10 * work.micro_tokens * shape.head // max(shape.hidden, 1)),
        "defences": sum(extra.memory for extra in extras.values()),
    }
