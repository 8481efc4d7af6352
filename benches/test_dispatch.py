"""Overhead of a call before its kernel: torch's dispatcher, which direct calls skip, and the host's launch work."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import pytest
import torch
from emulated_cuda import emulated

from safelora_fast.ops.base import served_by
from safelora_fast.ops.feature_distance import OP, feature_distance
from safelora_fast.ops.feature_distance import _node as node
from safelora_fast.ops.subspace_projection import matrix_products, transposed_products

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS, ROUNDS, MODULES = 200, 30, 196


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


def test_host_of_a_training_step(
    benchmark: Callable[..., None], add_row: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host time of the CUDA launches for a projection of 196 modules, with a driver that runs no kernel."""
    emulated(monkeypatch, runs_kernels=False)
    bases, factors = [torch.randn(64, 16) for _ in range(MODULES)], [torch.randn(64, 8) for _ in range(MODULES)]

    def step() -> None:
        inner, _ = transposed_products([*bases, *factors], [*factors, *factors])
        matrix_products(bases, inner[:MODULES])

    with served_by("cuda"):
        benchmark.pedantic(step, rounds=2 * ROUNDS, warmup_rounds=3)
    add_row(modules=MODULES, host_ms=round(benchmark.stats.stats.min * 1e3, 2))
