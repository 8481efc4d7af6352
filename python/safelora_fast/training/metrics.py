"""Figures of the defences for the trainer's log."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from safelora_fast.models.distributed import sum_over_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator


class Meter:
    """Sums per-defence figures of micro-batches, on the device, and reads them once when asked."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._pending: dict[str, torch.Tensor] = {}  # of the step that is coming, which may be left out
        self._latest: dict[str, float] = {}
        self._steps = self._pending_steps = 0.0
        self._device = torch.device("cpu")

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add this process's share of a defence's mean over one optimiser step."""
        value = value.detach().to(torch.float64)
        self._device = value.device
        self._pending[name] = self._pending[name] + value if name in self._pending else value

    def set(self, name: str, value: float) -> None:
        """Set a figure that is the same on every process; the latest counts."""
        self._latest[name] = value

    def micro_batch(self, share_of_step: float) -> None:
        """Count a micro-batch as a share of an optimiser step."""
        self._pending_steps += share_of_step

    def close(self, *, made: bool) -> None:
        """A step has been made, and its micro-batches count; or it was left out, and they are forgotten."""
        for name, value in self._pending.items() if made else ():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += self._pending_steps if made else 0.0
        self._pending.clear()
        self._pending_steps = 0.0

    def read(self, names: list[str]) -> dict[str, float]:
        """Means per optimiser step since the last call, over all processes; then start anew. Collective."""
        self.close(made=True)
        means: dict[str, float] = {}
        if self._steps:
            local = [float(self._sums.get(name, 0.0)) for name in names]
            totals = sum_over_ranks(local, self._device)
            means = {f"defense/{name}": total / self._steps for name, total in zip(names, totals, strict=True)}
        means.update((f"defense/{name}", value) for name, value in self._latest.items())
        self._sums.clear()
        self._latest.clear()
        self._steps = 0.0
        return means


class Stopwatch:
    """Share of the wall time that is spent inside `running()`, on this process.

    On a GPU the figure covers what the defences make the host wait for; kernels that run on are not attributed.
    """

    def __init__(self) -> None:
        self._inside = 0.0
        self._start = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of this block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._inside += time.perf_counter() - began

    def read(self) -> float:
        """Share since the last call."""
        now = time.perf_counter()
        share = self._inside / max(now - self._start, 1e-9)
        self._inside, self._start = 0.0, now
        return share
