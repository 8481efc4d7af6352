"""Which tokens of a packed row form a sequence, found on the device of the mask and without waiting for it."""

from __future__ import annotations

import torch


def pack(mask: torch.Tensor, segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the tokens of every row by segment.

    Args:
        mask: [batch, tokens] bool, the tokens that count.
        segments: [batch, tokens] int64; tokens of one row with one number are a sequence.

    Returns:
        order [batch, tokens]: the tokens of a row, sequence after sequence and each in the order in which they stand,
        then those that do not count; starts [batch, tokens + 1]: where each sequence starts in it, then where the last
        ends; counts [batch]: how many sequences there are. All int32 and contiguous.
    """
    batch, tokens = mask.shape
    by_segment = segments.argsort(dim=1, stable=True)
    order = by_segment.gather(1, (~mask).gather(1, by_segment).to(torch.uint8).argsort(dim=1, stable=True))
    counted, sorted_segments = mask.gather(1, order), segments.gather(1, order)
    first = counted.clone()
    first[:, 1:] &= sorted_segments[:, 1:] != sorted_segments[:, :-1]
    starts = counted.sum(1, keepdim=True).repeat(1, tokens + 2)  # the last column takes what is no start
    positions = torch.arange(tokens, device=mask.device).expand(batch, tokens)
    starts.scatter_(1, torch.where(first, first.cumsum(1) - 1, tokens + 1), positions)
    return order.int().contiguous(), starts[:, : tokens + 1].int().contiguous(), first.sum(1).int()
