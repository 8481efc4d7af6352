"""The part of a batch that defenses look at, as a smaller batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from safelora_fast.data.spans import Spans


@dataclass(frozen=True)
class Part:
    """Some rows of a batch [batch, tokens], cut to their first `width` tokens: a batch [rows, width].

    Attributes:
        batch: number of rows of the whole batch.
        tokens: number of tokens of its rows.
        rows: numbers of the rows that belong to the part, in ascending order.
        width: number of tokens of each row that belong to it.
    """

    batch: int
    tokens: int
    rows: tuple[int, ...]
    width: int

    def take(self, values: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Return the part of values [..., batch, tokens, ...], where `dim` is the dimension of the rows."""
        return self.take_rows(values, dim).narrow(dim + 1, 0, self.width)

    def take_rows(self, values: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Return the part's rows of values [..., batch, ...], with all their tokens."""
        if len(self.rows) == self.batch:
            return values
        return values.index_select(dim, torch.tensor(self.rows, device=values.device))

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Put values of the part [rows, width, ...] in their places in the batch [batch, tokens, ...]; zeros elsewhere."""
        whole = values.new_zeros(self.batch, self.tokens, *values.shape[2:])
        whole[torch.tensor(self.rows, device=values.device), : self.width] = values
        return whole


def part_of(spans: Spans, needed: torch.Tensor) -> Part | None:
    """Return the part of a batch with the rows that have a token in the mask `needed`; None if it is the whole batch.

    Padding behind the longest of these rows is cut off. Padding before a row stays, because positions may count it. In
    packed rows, documents that no one looks at stay: whether a document can be taken out of its row depends on the
    model's attention.
    """
    batch, tokens = needed.shape
    looked_at = needed.any(dim=1).tolist()
    rows = tuple(row for row in range(batch) if looked_at[row])
    if len(rows) == batch:
        return None
    width = tokens
    if rows and spans.segments is None:
        width = max(int(spans.real[row].nonzero()[-1]) + 1 for row in rows)
    return Part(batch, tokens, rows, width)
