"""Sequences of tokens whose answers are scored, and a batch of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from safelora_fast.data.tokens import IGNORED_LABEL

if TYPE_CHECKING:
    from collections.abc import Sequence


class Labelled(Protocol):
    """A sequence of tokens, and which of them are the answer: what :class:`~safelora_fast.data.tokens.Example` is."""

    @property
    def ids(self) -> list[int]:
        """The tokens."""

    @property
    def labels(self) -> list[int]:
        """The tokens of the answer, and -100 elsewhere."""


def padded(examples: Sequence[Labelled], device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tokens and attention mask, and at each position the label of the next token, [batch, tokens] each."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED_LABEL)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = 1
        labels[row, : length - 1] = torch.tensor(example.labels[1:])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, labels.to(device)
