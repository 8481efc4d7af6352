"""Sizes of a model and of an optimizer step, from which defenses estimate their cost per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK_BYTES = 64 << 20  # logits of the fused head, and KL's chunks of logits with their gradients
USUAL_RANK = 64  # assumed rank of a subspace that is not built yet


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that determine costs.

    Attributes:
        parameters: number of parameters of the frozen model.
        weight_bytes: bytes of the frozen model.
        matrices: number of matrix weights used per token, without the output head; of experts only the active ones.
        head: number of weights of the output head.
        adapter: number of trained parameters.
        adapted: (rows m, columns n, rank r) of every adapted module.
        layers: number of layers.
        hidden: width of a layer's output.
        attention: number of attention heads times head width.
        inner: inner width of the feed-forward part.
        value_bytes: bytes of one activation value.
        reached: share of the layers that backward passes through, from the lowest one with trained parameters.
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
    reached: float = 1.0

    def with_subspace(self, rank: int | None) -> Iterator[tuple[int, int, int, int]]:
        """Yield (m, n, r, k) of every adapted module, where k is the rank of its safe subspace."""
        for m, n, r in self.adapted:
            yield m, n, r, min(rank or USUAL_RANK, m, n)


@dataclass(frozen=True)
class Work:
    """The work of an average optimizer step, and the size of the largest micro-batch.

    Attributes:
        tokens: tokens of a step.
        squares: sum of the squared row lengths of a step, for the cost of attention.
        answers: completion tokens of a step.
        safe: tokens of a step that belong to safe examples.
        head_tokens: tokens of a step that the trainer's loss passes through the output head.
        micro_batches: forward passes of a step, on all processes.
        micro_tokens: tokens of the largest micro-batch.
        checkpointing: whether backward recomputes the layers (gradient checkpointing).
        optimizer_bytes: bytes of optimizer state per trained parameter.
        epochs: passes over the examples.
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
    epochs: float


@dataclass(frozen=True)
class Extra:
    """The cost that a defense adds to a step, without the reference pass, which defenses share.

    Attributes:
        flops: floating-point operations per step.
        memory: bytes of additional peak memory.
        words: source of the cost, in words.
    """

    flops: float
    memory: float
    words: str
