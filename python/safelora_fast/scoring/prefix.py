"""Tokens with which all sequences of a batch begin: attended to by each, but run through the model once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast.training.batch import IGNORED_LABEL
from safelora_fast.training.reference import CACHES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from safelora_fast.scoring.sequences import Labelled

# Two calls of the model pay from this share of the batch's tokens on.
WORTH = 1 / 16


def shared_prefix(examples: Sequence[Labelled]) -> int:
    """Tokens that are the same in front of all examples and that predict no answer; 0 where to share them saves little."""
    sequences = [example.ids for example in examples]
    lowest, highest = min(sequences), max(sequences)  # as words in a dictionary: what these two share, all do
    length = next((place for place, (a, b) in enumerate(zip(lowest, highest, strict=False)) if a != b), len(lowest))
    for example in examples:
        first = next(place for place, label in enumerate(example.labels) if place and label != IGNORED_LABEL)
        length = min(length, first - 1)
    tokens = len(examples) * max(map(len, sequences))
    return length if length * (len(examples) - 1) >= WORTH * tokens else 0


def past_of(model: nn.Module, prefix: torch.Tensor, rows: int, **options: Any) -> dict[str, Any]:
    """The model's argument that stands for a prefix [1, tokens] of so many rows; raises what a model raises without one."""
    output = model(input_ids=prefix, use_cache=True, **options)
    name = next(name for name in reversed(CACHES) if getattr(output, name, None) is not None)
    past = getattr(output, name)
    past.batch_repeat_interleave(rows)
    return {name: past}
