"""Batches of sequences of like length, so that little is padded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence


def batches_by_length(
    lengths: Sequence[int], tokens_per_batch: int, *, alone_beyond: int | None = None
) -> list[list[int]]:
    """Indices of sequences in batches, the longest first: what does not fit in memory shows at once.

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
