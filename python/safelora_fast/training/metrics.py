"""Accumulators for training metrics: sums over micro-batches and processes, and shares of wall time."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from safelora_fast.models.distributed import sum_over_ranks, world_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Sums:
    """Sums of named values over micro-batches, kept on the device. The values of a step count only if it was made."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._device = torch.device("cpu")

    def add(self, name: str, value: torch.Tensor | float) -> None:
        """Add a value of a micro-batch, without a device synchronization."""
        value = torch.as_tensor(value).detach().to(torch.float64)
        if value.device.type != "cpu":
            self._device = value.device
        self._pending[name] = self._pending[name] + value if name in self._pending else value

    def close(self, *, made: bool) -> None:
        """End an optimizer step: add its micro-batches to the sums if it was made, drop them if it was skipped."""
        for name, value in self._pending.items() if made else ():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._pending.clear()

    def read(self, names: Sequence[str]) -> dict[str, float]:
        """Return the sums since the last call, over all processes and including the last step. Collective."""
        self.close(made=True)
        local = [float(self._sums.get(name, 0.0)) for name in names]
        self._sums.clear()
        return dict(zip(names, sum_over_ranks(local, self._device), strict=True))


STEPS = ""  # no defense has this name


class StepSums(Sums):
    """Sums that can be read as means per optimizer step."""

    def add_step(self, share: float) -> None:
        """Count a micro-batch as a share of an optimizer step."""
        self.add(STEPS, share)

    def means(self, names: Sequence[str]) -> dict[str, float]:
        """Return means per optimizer step since the last call, over all processes; empty without steps. Collective."""
        sums = self.read([*names, STEPS] if names else [])  # without names there is nothing to exchange
        steps = sums.get(STEPS, 0.0) / world_size()
        return {name: sums[name] / steps for name in names} if steps else {}


class Stopwatch:
    """Share of this process's wall time that is spent inside `running()`.

    On a GPU this is host time, including synchronizations. Kernels that still run after the context are not included.
    """

    def __init__(self) -> None:
        self._inside = 0.0
        self._start = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time spent inside this context."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._inside += time.perf_counter() - began

    def read(self) -> float:
        """Return the share since the last call."""
        now = time.perf_counter()
        share = self._inside / max(now - self._start, 1e-9)
        self._inside, self._start = 0.0, now
        return share
