"""Random draws of examples that depend on their tokens, the seed and the optimizer step, and on nothing else."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from safelora_fast.data.spans import Spans


def draws(batch: Mapping[str, Any], spans: Spans, *, seed: int, step: int) -> torch.Tensor:
    """Return a number of each example, uniform in [0, 1), at each of its tokens: float64 [batch, tokens], else 1.

    The number is a hash of the example's tokens, the seed and the step. So a resumed run, another split into
    micro-batches or processes, and other padding or packing draw the same examples. Equal examples of one step get equal
    numbers.

    Args:
        batch: the collated batch.
        spans: its masks and documents.
        seed: seed of the run.
        step: number of optimizer steps made before this one.

    Raises:
        SettingsError: the batch has no `input_ids`.
    """
    found = torch.ones(spans.real.shape, dtype=torch.float64)
    for row, columns, digest in example_digests(batch, spans):
        hashed = hashlib.blake2b(digest + f"{seed} {step}".encode(), digest_size=8).digest()
        found[row, columns] = (int.from_bytes(hashed, "little") >> 11) * 2.0**-53
    return found.to(spans.real.device)


def example_digests(batch: Mapping[str, Any], spans: Spans) -> Iterator[tuple[int, torch.Tensor, bytes]]:
    """Yield (row, columns, digest of the token ids) of each example of a batch, without padding.

    In packed rows each document is an example.

    Raises:
        SettingsError: the batch has no `input_ids`.
    """
    if batch.get("input_ids") is None:
        raise SettingsError("examples are told apart by their tokens, but the batch has no input_ids: set sample=1")
    ids, real = batch["input_ids"].cpu(), spans.real.cpu()
    segments = None if spans.segments is None else spans.segments.cpu()
    for row in range(len(ids)):
        columns = real[row].nonzero().squeeze(1)
        if segments is None:
            examples: tuple[torch.Tensor, ...] = (columns,)
        else:
            lengths = segments[row, columns].unique_consecutive(return_counts=True)[1]
            examples = columns.split(lengths.tolist())
        for example in examples:
            tokens = ids[row, example].to(torch.int64).numpy()
            yield row, example, hashlib.blake2b(tokens.astype("<i8").tobytes(), digest_size=16).digest()
