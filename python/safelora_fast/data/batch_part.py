"""The part of a batch that defenses look at, as a smaller batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Part:
    """Some rows of a batch [batch, tokens], cut to `width` tokens each: a batch [rows, width].

    Attributes:
        batch: number of rows of the whole batch.
        tokens: number of tokens of its rows.
        rows: numbers of the rows that belong to the part, in ascending order.
        width: number of tokens of each row that belong to it.
        columns: places of these tokens in each row, [rows, width] int64 on the CPU; None for the first `width`. They are
            those of whole documents in ascending order, and behind them other tokens of the row, also in ascending order,
            which fill it up.
    """

    batch: int
    tokens: int
    rows: tuple[int, ...]
    width: int
    columns: torch.Tensor | None = None

    def by_rows(self) -> Part:
        """Return the part with all documents of its rows.

        It has at least two rows if the batch has: flash attention separates documents only in a batch of one row.
        """
        rows = self.rows
        if len(rows) == 1 and self.batch > 1:
            rows = tuple(sorted((rows[0], (rows[0] + 1) % self.batch)))
        return replace(self, rows=rows, width=self.tokens, columns=None)

    def take(self, values: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Return the part of values [..., batch, tokens, ...], where `dim` is the dimension of the rows."""
        if self.columns is None:
            return self.take_rows(values, dim).narrow(dim + 1, 0, self.width)
        index = self._places(values.device).flatten()
        shape = (*values.shape[:dim], len(self.rows), self.width, *values.shape[dim + 2 :])
        return values.flatten(dim, dim + 1).index_select(dim, index).view(shape)

    def take_rows(self, values: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Return the part's rows of values [..., batch, ...], with all their tokens."""
        if len(self.rows) == self.batch:
            return values
        return values.index_select(dim, torch.tensor(self.rows, device=values.device))

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Put values of the part [rows, width, ...] in their places in the batch [batch, tokens, ...]; zeros elsewhere."""
        whole = values.new_zeros(self.batch * self.tokens, *values.shape[2:])
        whole[self._places(values.device)] = values
        return whole.view(self.batch, self.tokens, *values.shape[2:])

    def _places(self, device: torch.device) -> torch.Tensor:
        """Return the flat places of the part's tokens in the batch, [rows, width]."""
        columns = torch.arange(self.width) if self.columns is None else self.columns
        return (torch.tensor(self.rows)[:, None] * self.tokens + columns).to(device)


def part_of(
    real: torch.Tensor, segments: torch.Tensor | None, needed: torch.Tensor, *, documents: bool = True
) -> Part | None:
    """Return the part of a batch with the examples that have a token in the mask `needed`; None if it is the whole batch.

    Padding behind the longest row is cut off. Padding before a row stays, because positions may count it.

    Args:
        real: tokens that are not padding, [batch, tokens] bool.
        segments: for packed sequences, a document number per token, [batch, tokens]; else None.
        needed: [batch, tokens] bool.
        documents: whether to cut packed rows to the documents that have such a token, instead of keeping them whole.
    """
    batch, tokens = needed.shape
    needed = needed.cpu()
    rows = tuple(needed.any(dim=1).nonzero().flatten().tolist())
    part = Part(batch, tokens, rows, tokens)
    if not rows:
        return part
    if segments is None:
        width = max(int(real[row].nonzero()[-1]) + 1 for row in rows)
        return None if len(rows) == batch else replace(part, width=width)
    if documents and (columns := _columns_of_documents(segments.cpu(), needed, rows)) is not None:
        return replace(part, width=columns.shape[1], columns=columns)
    part = part.by_rows()
    return None if len(part.rows) == batch else part


def _columns_of_documents(segments: torch.Tensor, needed: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor | None:
    """Return the columns of the documents that have a needed token, then others; None if a row needs all its documents."""
    kept = torch.stack([torch.isin(segments[row], segments[row][needed[row]]) for row in rows])
    width = int(kept.sum(dim=1).max())
    if width == segments.shape[1]:
        return None
    return torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)[:, :width]
