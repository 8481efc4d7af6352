"""What the log says of a training: sums over micro-batches and processes, and shares of time."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from safelora_fast.models.distributed import sum_over_ranks, world_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Sums:
    """Sums of named values over micro-batches, on the device; those of a step count once the step has been made."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._device = torch.device("cpu")

    def add(self, name: str, value: torch.Tensor | float) -> None:
        """Add a value of a micro-batch; nothing is read off the device."""
        value = torch.as_tensor(value).detach().to(torch.float64)
        if value.device.type != "cpu":
            self._device = value.device
        self._pending[name] = self._pending[name] + value if name in self._pending else value

    def close(self, *, made: bool) -> None:
        """A step has been made, and its micro-batches count; or it was left out, and they are forgotten."""
        for name, value in self._pending.items() if made else ():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._pending.clear()

    def read(self, names: Sequence[str]) -> dict[str, float]:
        """The sums since the last call over all processes, the last step's among them. Collective."""
        self.close(made=True)
        local = [float(self._sums.get(name, 0.0)) for name in names]
        self._sums.clear()
        return dict(zip(names, sum_over_ranks(local, self._device), strict=True))


STEPS = ""  # no defense has this name


class StepSums(Sums):
    """Sums that are read as means per optimizer step."""

    def add_step(self, share: float) -> None:
        """Count a micro-batch as a share of an optimizer step."""
        self.add(STEPS, share)

    def means(self, names: Sequence[str]) -> dict[str, float]:
        """Means per optimizer step since the last call, over all processes; none where no step was made. Collective."""
        sums = self.read([*names, STEPS] if names else [])  # nothing is sent where there is nothing to sum
        steps = sums.get(STEPS, 0.0) / world_size()
        return {name: sums[name] / steps for name in names} if steps else {}


class Stopwatch:
    """Share of the wall time that is spent inside `running()`, on this process.

    On a GPU it covers what the defenses make the host wait for; kernels that run on are not attributed.
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
