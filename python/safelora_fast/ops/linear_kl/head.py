"""From hidden states to logits and back: one output head, shared by student and reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

# Logits of one model that a chunk may have: large enough for the matrix product to be efficient.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "other": 1 << 26}
# Those of a block of a chunk, which the elementwise passes go over while they are in cache.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "other": 1 << 24}


@dataclass(frozen=True)
class Head:
    """softcap(scale · (h·Wᵀ + bias)), in the dtype of `weight`."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    def bend(self, raw: torch.Tensor, delta: torch.Tensor) -> torch.Tensor | None:
        """Turn h₀·Wᵀ and (h − h₀)·Wᵀ into the reference's logits and the student's distance to them, in place.

        Returns:
            Slope of the soft-cap at the student's logits, None where there is none.
        """
        if self.bias is not None:
            raw.add_(self.bias.to(raw))
        if self.scale != 1.0:
            raw.mul_(self.scale)
            delta.mul_(self.scale)
        if self.softcap is None:
            return None
        bent = raw.add(delta).div_(self.softcap).tanh_()
        raw.div_(self.softcap).tanh_()
        # tanh a − tanh b = tanh(a − b)·(1 − tanh a·tanh b)
        delta.div_(self.softcap).tanh_().mul_(self.softcap).mul_(1 - raw * bent)
        raw.mul_(self.softcap)
        return bent.square_().neg_().add_(1)


class Chunk:
    """Buffers for the logits of a chunk of tokens, made once and used for every chunk.

    Args:
        head: the output head.
        tokens: how many tokens there are in all.
    """

    def __init__(self, head: Head, tokens: int) -> None:
        self.head = head
        vocabulary, device = len(head.weight), head.weight.device
        kind = "cpu" if device.type == "cpu" else "other"
        self.tokens = max(min(CHUNK_ELEMENTS[kind] // vocabulary, tokens), 1)
        self._stacked = torch.empty(2 * self.tokens, vocabulary, dtype=head.weight.dtype, device=device)

    def fill(self, hidden: torch.Tensor, reference: torch.Tensor) -> None:
        """Make h₀·Wᵀ and (h − h₀)·Wᵀ by one product; both are [tokens, hidden] in the exact dtype."""
        states = torch.cat([reference, hidden - reference]).to(self.head.weight.dtype)
        self._count = len(hidden)
        torch.mm(states, self.head.weight.T, out=self._stacked[: len(states)])

    def blocks(self, rows: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(which rows, h₀·Wᵀ, (h − h₀)·Wᵀ), at most so many at once; what the caller leaves in the last one is kept."""
        for start in range(0, self._count, rows):
            part = slice(start, min(start + rows, self._count))
            yield part, self._stacked[part], self._stacked[self._count + part.start : self._count + part.stop]

    def back(self) -> torch.Tensor:
        """Gradients with respect to the logits, left in the blocks, times W: [tokens, hidden]."""
        return self._stacked[self._count : 2 * self._count] @ self.head.weight
