"""The feature distance on five layers of a 7B model, compared with torch and torch.compile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from figures import Figure, agree
from torch._functorch import config

from safelora_fast.ops import feature_distance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from timing import Timer

    Distance = Callable[[list[torch.Tensor], list[torch.Tensor], torch.Tensor], torch.Tensor]

BLOCKS, BATCH, TOKENS, HIDDEN = 5, 4, 2048, 3584


def plain(features: list[torch.Tensor], references: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """The obvious implementation: unit vectors of each sequence, in float32."""
    total = features[0].new_zeros((), dtype=torch.float32)
    for block, reference in zip(features, references, strict=True):
        x, y = (torch.where(mask[..., None], states.float(), 0).flatten(1) for states in (block, reference))
        x, y = (states / states.norm(dim=1, keepdim=True) for states in (x, y))
        total = total + (x - y).square().sum(1).mean()
    return total


def figures(timer: Timer, backends: list[str], use: Callable[[str | None], None]) -> Iterator[Figure]:
    """Forward and backward of every provider, and ours as multiples of the peers'."""
    size = BLOCKS * BATCH * TOKENS * HIDDEN * 2
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool, device=timer.device)
    shape = (BATCH, TOKENS, HIDDEN)
    sets = []
    for _ in range(timer.sets(2 * size)):
        reference = [torch.randn(shape, device=timer.device, dtype=torch.bfloat16) for _ in range(BLOCKS)]
        moved = [(block + 0.05 * torch.randn_like(block)).requires_grad_() for block in reference]
        sets.append((moved, reference))
    # The backward is measured repeatedly on one graph, which therefore may not reuse its buffers.
    config.donated_buffer = False
    peers = {"torch": plain, "torch.compile": torch.compile(plain)}
    times = {name: measured(timer, peer, sets, mask) for name, peer in peers.items()}
    expected = plain(*sets[0], mask)
    gradients = torch.autograd.grad(expected, sets[0][0])
    for name, (read, written) in times.items():
        yield Figure(name, "forward", "ms", read)
        yield Figure(name, "backward", "ms", written)
    for name in backends:
        use(name)
        provider = f"ours, {name}"
        value = feature_distance(*sets[0], mask)
        agree(provider, [value, *torch.autograd.grad(value, sets[0][0])], [expected, *gradients], 2e-2)
        found = measured(timer, feature_distance, sets, mask)
        for index, (part, moved_bytes) in enumerate((("forward", 2 * size), ("backward", 3 * size))):
            milliseconds = found[index]
            yield Figure(provider, part, "ms", milliseconds)
            yield Figure(provider, part, "of a copy", timer.share_of_copy(moved_bytes, milliseconds), least=0.85)
            for peer, least in (("torch", 3), ("torch.compile", 1.2)):
                yield Figure(provider, part, f"× {peer}", times[peer][index] / milliseconds, least=least)
        use(None)


def measured(timer: Timer, operation: Distance, sets: list, mask: torch.Tensor) -> tuple[float, float]:
    """Return the milliseconds of the forward and of the backward."""
    values = [operation(*given, mask) for given in sets]
    backward = timer.time([
        lambda value=value, given=given: torch.autograd.grad(value, given[0], retain_graph=True)
        for value, given in zip(values, sets, strict=True)
    ])  # fmt: skip
    del values
    with torch.no_grad():
        return timer.time([lambda given=given: operation(*given, mask) for given in sets]), backward
