"""Sizes of a model and of an optimizer step, from which a defense estimates what it adds to a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK_BYTES = 64 << 20  # logits of the fused head, and of KL's chunks with their gradients
USUAL_RANK = 64  # of a subspace, where only building it would tell


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
        layers: number of layers.
        hidden: width of a layer's output.
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

    def with_subspace(self, rank: int | None) -> Iterator[tuple[int, int, int, int]]:
        """(m, n, r, k) of every adapted module, with k the rank of its safe subspace."""
        for m, n, r in self.adapted:
            yield m, n, r, min(rank or USUAL_RANK, m, n)


@dataclass(frozen=True)
class Work:
    """How much is done in an optimizer step, on average, and at most in a micro-batch.

    Attributes:
        tokens: tokens of a step.
        squares: sum over rows of a step of their squared length, which attention pays for.
        answers: tokens of a step that are learned.
        safe: tokens of a step that belong to safe examples.
        head_tokens: tokens of a step that the trainer's loss takes through the output head.
        micro_batches: forward passes of a step, on all processes.
        micro_tokens: tokens of the largest micro-batch.
        checkpointing: whether layers are computed again in backward.
        optimizer_bytes: bytes of optimizer state per trained parameter.
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
    """What a defense adds to a step, beside the reference pass that defenses share.

    Attributes:
        flops: operations per step.
        memory: bytes at the peak.
        words: where they come from.
    """

    flops: float
    memory: float
    words: str
