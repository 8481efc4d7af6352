"""What a step costs, and what each defence adds: arithmetic on shapes. Every figure is an estimate.

Matrix products and attention are counted, at two operations a multiply-add; norms, activations, the optimiser and padding
are not. The frozen weights get no gradient, so backward costs one product a weight where full fine-tuning costs two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safelora_fast.defenses import KL, BatchDefense, FeatureDistance, SafeLora, Steering, SubspacePenalty

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from safelora_fast.defenses import Defense
    from safelora_fast.recipe.defense_section import DefenseSpec

CHUNK_BYTES = 64 << 20  # logits of the fused head, and of the KL's chunks with their gradients


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that costs depend on.

    Attributes:
        parameters: of the frozen model.
        weight_bytes: of the frozen model.
        matrices: weights that every token is multiplied by, without the output head; of experts, those that are used.
        head: weights of the output head.
        adapter: trained parameters.
        adapted: (rows m, columns n, rank r) of every adapted module.
        layers: blocks.
        hidden: width of a block's output.
        attention: heads times their width.
        inner: width inside the feed-forward part.
        value_bytes: bytes of an activation.
    """

    parameters: int
    weight_bytes: int
    matrices: int
    head: int
    adapter: int
    adapted: tuple[tuple[int, int, int], ...]
    layers: int
    hidden: int
    attention: int
    inner: int
    value_bytes: int


@dataclass(frozen=True)
class Work:
    """How much is done in an optimiser step, on average, and at most in a micro-batch.

    Attributes:
        tokens: tokens of a step.
        squares: sum over rows of a step of their squared length, which attention pays for.
        answers: tokens of a step that are learnt.
        safe: tokens of a step that are of safe rows.
        head_tokens: tokens of a step that the trainer's loss takes through the output head.
        micro_batches: forward passes of a step, on all processes.
        micro_tokens: tokens of the largest micro-batch.
        checkpointing: whether blocks are computed again in backward.
        optimizer_bytes: bytes of optimiser state a trained parameter.
    """

    tokens: float
    squares: float
    answers: float
    safe: float
    head_tokens: float
    micro_batches: int
    micro_tokens: int
    checkpointing: bool
    optimizer_bytes: int


@dataclass(frozen=True)
class Extra:
    """What a defence adds.

    Attributes:
        flops: operations a step.
        memory: bytes at the peak.
        words: where they come from.
    """

    flops: float
    memory: float
    words: str


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
    needs_reference = any(issubclass(spec.kind, BatchDefense) for spec in specs)
    reference = 2 * shape.matrices * work.tokens + attention if needs_reference else 0.0
    extras = {spec.name: _extra(spec, shape, work) for spec in specs}
    return Cost(step, reference, extras, _memory(shape, work, extras))


def switched_on(spec: DefenseSpec) -> bool:
    """Whether its settings leave it on: a weight or a coefficient of 0 costs nothing."""
    return spec.settings.get("weight") != 0 and spec.settings.get("coefficient") != 0


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


def _extra(spec: DefenseSpec, shape: Shape, work: Work) -> Extra:
    for kind, function in ESTIMATES.items():
        if issubclass(spec.kind, kind):
            return function(spec.settings, shape, work)
    return Extra(0.0, 0.0, "cost not known")


def _kl(settings: Any, shape: Shape, work: Work) -> Extra:
    tokens = {"completion": work.answers, "safe": work.safe}.get(settings["tokens"], work.tokens)
    states = 3 * work.micro_tokens * shape.hidden * shape.value_bytes
    return Extra(
        6 * shape.head * tokens, CHUNK_BYTES + states, "reference pass, and three products with the output head"
    )


def _feature_distance(settings: Any, shape: Shape, work: Work) -> Extra:
    layers = settings["layers"]
    if isinstance(layers, str):
        blocks = -(-shape.layers // int(layers.partition(":")[2]))
    else:
        blocks = min(layers, shape.layers) if isinstance(layers, int) else len(layers)
    values = blocks * shape.hidden
    words = f"reference pass, and two reads of the outputs of {blocks} blocks"
    return Extra(16.0 * values * work.tokens, 3 * values * work.micro_tokens * shape.value_bytes, words)


def _subspace_penalty(settings: Any, shape: Shape, work: Work) -> Extra:
    flops = sum(3 * (4 * m * k * r + 2 * r * r * (m + n)) for m, n, r, k in _with_ranks(settings, shape))
    return Extra(
        flops * work.micro_batches, _vectors(settings, shape), "products with U_k and small Grams, in every micro-batch"
    )


def _safelora(settings: Any, shape: Shape, _work: Work) -> Extra:
    if settings["at"] == "step":
        every = settings["every"] or 1
        flops = sum(4 * m * k * r + 2 * r * r * (m + n) for m, n, r, k in _with_ranks(settings, shape))
        when = "step" if every == 1 else f"{every}th step"
        return Extra(flops / every, _vectors(settings, shape), f"products with U_k after every {when}")
    products = sum(4 * m * n * r for m, n, r in shape.adapted)
    streamed = sum(m * n for m, n, _ in shape.adapted)
    once = f"{streamed / 1e9:.3g} billion weights of both checkpoints, {products / 1e9:.3g} GFLOP"
    words = f"nothing in a step; once at the end {once}"
    return Extra(0.0, 0.0, words)


def _steering(_settings: Any, shape: Shape, work: Work) -> Extra:
    return Extra(2.0 * shape.hidden * work.tokens, 4.0 * shape.hidden, "one addition to a block's output")


def _with_ranks(settings: Any, shape: Shape) -> Iterator[tuple[int, int, int, int]]:
    """(m, n, r, k) of every adapted module; k is the subspace's rank, 64 where only building it would tell."""
    source = settings["subspace"]
    rank = (source.get("rank") if isinstance(source, dict) else None) or 64
    for m, n, r in shape.adapted:
        yield m, n, r, min(rank, m, n)


def _vectors(settings: Any, shape: Shape) -> float:
    return float(sum(4 * m * k for m, _, _, k in _with_ranks(settings, shape)))


ESTIMATES: dict[type[Defense], Callable[[Any, Shape, Work], Extra]] = {
    KL: _kl,
    FeatureDistance: _feature_distance,
    SubspacePenalty: _subspace_penalty,
    SafeLora: _safelora,
    Steering: _steering,
}
