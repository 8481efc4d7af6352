"""The feature distance on five blocks of a 7B model, beside torch and torch.compile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from timing import Timer, time

from safelora_fast.ops import feature_distance

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCKS, BATCH, TOKENS, HIDDEN = 5, 4, 2048, 3584


def plain(features: list[torch.Tensor], references: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """As one would write it: unit vectors of each sequence, in float32."""
    total = features[0].new_zeros((), dtype=torch.float32)
    for block, reference in zip(features, references, strict=True):
        x, y = (torch.where(mask[..., None], states.float(), 0).flatten(1) for states in (block, reference))
        x, y = (states / states.norm(dim=1, keepdim=True) for states in (x, y))
        total = total + (x - y).square().sum(1).mean()
    return total


def rows(timer: Timer, backends: list[str], use: object) -> Iterator[dict[str, object]]:
    """One row per provider: forward and backward."""
    size = BLOCKS * BATCH * TOKENS * HIDDEN * 2
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool, device=timer.device)
    shape = (BATCH, TOKENS, HIDDEN)
    sets = []
    for _ in range(timer.sets(2 * size)):
        reference = [torch.randn(shape, device=timer.device, dtype=torch.bfloat16) for _ in range(BLOCKS)]
        moved = [(block + 0.05 * torch.randn_like(block)).requires_grad_() for block in reference]
        sets.append((moved, reference))
    providers = {f"ours, {name}": (name, feature_distance) for name in backends}
    providers["torch"] = (None, plain)
    providers["torch.compile"] = (None, torch.compile(plain))
    for provider, (backend, operation) in providers.items():
        use(backend)

        def forward(features, references, operation=operation):
            return operation(features, references, mask)

        values = [forward(*given) for given in sets]
        backward = time([
            lambda value=value, given=given: torch.autograd.grad(value, given[0], retain_graph=True)
            for value, given in zip(values, sets, strict=True)
        ])  # fmt: skip
        del values
        with torch.no_grad():
            read = time([lambda given=given: forward(*given) for given in sets])
        yield {"provider": provider, "pass": "forward", "ms": read, "of_copy": timer.share_of_copy(2 * size, read)}
        yield {
            "provider": provider,
            "pass": "backward",
            "ms": backward,
            "of_copy": timer.share_of_copy(3 * size, backward),
        }
