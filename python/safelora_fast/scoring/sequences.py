"""Padding and batching token sequences whose completions are scored."""

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
    """Tokens with labels that mark the completion; :class:`~safelora_fast.data.tokens.Example` implements it."""

    @property
    def ids(self) -> list[int]:
        """The tokens."""

    @property
    def labels(self) -> list[int]:
        """The completion's tokens, and -100 at all other positions."""


def padded(examples: Sequence[Labelled], device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return input_ids and attention_mask, and each position's next-token label, all [batch, tokens]."""
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
    """Return batches of sequence indices by length, longest first, so that running out of memory shows at once.

    Args:
        lengths: number of tokens of each sequence.
        tokens_per_batch: maximum number of tokens in a batch, padding included; a longer sequence gets its own batch.
        alone_beyond: a sequence with more tokens than this gets its own batch too; these come last, shortest first.

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
    """Return the length beyond which a model rescales its rotary positions (dynamic NTK, LongRoPE), or None.

    Such a model scales all sequences of a batch by the longest one, so cached keys of a short prefix would be wrong.

    Args:
        config: the text model's configuration.
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
    """Yield settings of rotary embeddings: one for all layers, or one per kind of layer."""
    if isinstance(settings, Mapping):
        yield settings
        for value in settings.values():
            yield from _ropes(value)
