"""Overhead of a call before its kernel: torch's dispatcher, which direct calls skip, and the host's launch work."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from emulated_cuda import emulated
from tiny_models import random_subspace, tiny_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from safelora_fast.defenses.parts.safe_modules import SafeModules
from safelora_fast.ops.base import served_by
from safelora_fast.ops.feature_distance import OP, feature_distance
from safelora_fast.ops.feature_distance import _node as node
from safelora_fast.ops.subspace_projection import matrix_products, transposed_products

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS, ROUNDS, MODULES, LAYERS = 200, 30, 196, 28


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
    add_row(passes="products, planned at each call", modules=MODULES, host_ms=_fastest(benchmark))


def test_host_of_safelora_at_each_step(
    benchmark: Callable[..., None], add_row: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host time of `SafeLora(at="step")` for 196 small modules, prepared once, and planned at each call.

    The operations of torch run on the CPU and count, so a GPU's host does less; `operations` is their number.
    """
    model = tiny_peft_model(layers=LAYERS, lora={"r": 8})
    modules = SafeModules(model.get_base_model(), random_subspace(model), owner="bench")
    assert len(modules.modules) == MODULES
    emulated(monkeypatch, runs_kernels=False)
    with served_by("cuda"):
        benchmark.pedantic(lambda: modules.project(1), rounds=10 * ROUNDS, warmup_rounds=3)
        with _Counted() as counted:
            modules.project(1)
        monkeypatch.setattr(modules, "_check_finite", lambda *_: None)  # no kernel has written the products
        seconds: list[float] = []
        for _ in range(10 * ROUNDS):
            start = time.perf_counter()
            with torch.no_grad():
                modules._project_each(modules.modules, 1)
            seconds.append(time.perf_counter() - start)
    add_row(passes="a step, planned at each call", modules=MODULES, host_ms=round(min(seconds) * 1e3, 2))
    add_row(
        passes="a step, prepared", modules=MODULES, host_ms=_fastest(benchmark),
        operations=counted.operations,
    )  # fmt: skip


def _fastest(benchmark: Any) -> float:
    return round(benchmark.stats.stats.min * 1e3, 2)


class _Counted(TorchDispatchMode):
    operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return function(*args, **(kwargs or {}))
