"""What torch's dispatcher adds to a small call: why calls that are not compiled go to the backend at once."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import pytest
import torch

from safelora_fast.ops.feature_distance import OP, feature_distance
from safelora_fast.ops.feature_distance import _node as node

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS, ROUNDS = 200, 30


@pytest.mark.parametrize("blocks", [1, 5])
def test_dispatch(benchmark: Callable[..., None], add_row: Callable[..., None], blocks: int) -> None:
    features = [torch.randn(1, 4, 16, requires_grad=True) for _ in range(blocks)]
    references = [torch.randn(1, 4, 16) for _ in range(blocks)]
    mask = torch.ones(1, 4, dtype=torch.bool)
    calls = {
        "forward": (
            lambda: feature_distance(features, references, mask),
            lambda: node(features, references, mask, "sequence", None)[0],
        ),
        "forward and backward": (
            lambda: torch.autograd.grad(feature_distance(features, references, mask), features),
            lambda: torch.autograd.grad(node(features, references, mask, "sequence", None)[0], features),
        ),
    }
    for passes, (direct, dispatched) in calls.items():
        seconds: dict[Callable[[], object], list[float]] = {direct: [], dispatched: []}

        def measure(seconds: dict[Callable[[], object], list[float]] = seconds) -> None:
            for _ in range(ROUNDS):
                for call, found in seconds.items():
                    start = time.perf_counter()
                    for _ in range(CALLS):
                        call()
                    found.append((time.perf_counter() - start) / CALLS)

        if passes == "forward":
            benchmark.pedantic(measure, rounds=1)
        else:
            measure()
        ours, theirs = (statistics.median(found) * 1e6 for found in seconds.values())
        add_row(
            blocks=blocks, passes=passes, direct_us=round(ours, 1), dispatched_us=round(theirs, 1), ratio=round(theirs / ours, 2)
        )  # fmt: skip
    assert OP.choose(features).name == "native"
