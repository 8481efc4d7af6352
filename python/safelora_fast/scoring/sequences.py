"""Sequences of tokens whose completions are scored, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from safelora_fast.data.tokens import IGNORED_LABEL
from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROPE_SETTINGS = ("rope_parameters", "rope_scaling")  # from transformers 5, and before
ORIGINAL_LENGTH = "original_max_position_embeddings"


class Labelled(Protocol):
    """A sequence of tokens, and which of them are the completion; :class:`~safelora_fast.data.tokens.Example` is one."""

    @property
    def ids(self) -> list[int]:
        """The tokens."""

    @property
    def labels(self) -> list[int]:
        """The tokens of the completion, and -100 elsewhere."""


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


def batches_by_length(
    lengths: Sequence[int], tokens_per_batch: int, *, alone_beyond: int | None = None
) -> list[list[int]]:
    """Indices of sequences in batches of like length, the longest first: what does not fit in memory shows at once.

    Args:
        lengths: tokens of each sequence.
        tokens_per_batch: the most tokens of a batch, padding included; a longer sequence is a batch of its own.
        alone_beyond: a sequence of more tokens than this is a batch of its own too; those come last, the shortest first.

    Raises:
        SettingsError: `tokens_per_batch` is below 1.
    """
    if tokens_per_batch < 1:
        raise SettingsError(f"tokens_per_batch is {tokens_per_batch}, it must be at least 1")
    batches: list[list[int]] = []
    alone: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if alone_beyond is not None and lengths[index] > alone_beyond:
            alone.append([index])
            continue
        longest = lengths[batches[-1][0]] if batches else 0
        if not batches or longest * (len(batches[-1]) + 1) > tokens_per_batch:
            batches.append([])
        batches[-1].append(index)
    return batches + alone[::-1]


def stretched_beyond(config: Any) -> int | None:
    """The tokens beyond which a model stretches its rotary positions (dynamic NTK, LongRoPE); None if it never does.

    Such a model uses the longest sequence of a batch for all of them, and keys from a short prefix are wrong behind it.

    Args:
        config: of the text model.
    """
    limits = []
    for rope in (rope for name in ROPE_SETTINGS for rope in _ropes(getattr(config, name, None))):
        kind = rope.get("rope_type", rope.get("type"))
        if kind == "longrope":
            limit = rope.get(ORIGINAL_LENGTH) or getattr(config, ORIGINAL_LENGTH, None)
            limits.append(int(limit or config.max_position_embeddings))
        elif isinstance(kind, str) and "dynamic" in kind:
            limits.append(int(config.max_position_embeddings))
    return min(limits, default=None)


def _ropes(settings: Any) -> Iterator[Mapping[str, Any]]:
    """Settings of rotary embeddings: one for all layers, or one for each kind of layer."""
    if isinstance(settings, Mapping):
        yield settings
        for value in settings.values():
            yield from _ropes(value)
