"""GPU timing with events, on inputs that are in no cache, and the rate of a copy measured in the same run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROUNDS = 20
L2_FALLBACK = 128 << 20
HEAD_START = 40_000_000  # cycles, about 20 ms: longer than the host needs to launch the measured work
COPIED = 1 << 30


@dataclass
class Timer:
    """Measures median milliseconds on one device.

    Attributes:
        device: the GPU.
        copy_bytes_per_ms: bytes read and written per millisecond by a large copy.
    """

    device: torch.device
    copy_bytes_per_ms: float = 1.0

    @classmethod
    def on(cls, device: torch.device) -> Timer:
        """Measure the copy rate on several pairs of tensors of 1 GiB."""
        timer = cls(device)
        sources = [torch.empty(COPIED, dtype=torch.uint8, device=device).random_() for _ in range(2)]
        target = torch.empty_like(sources[0])
        milliseconds = timer.time([lambda source=source: target.copy_(source) for source in sources])
        timer.copy_bytes_per_ms = 2 * COPIED / milliseconds
        return timer

    def sets(self, bytes_a_set: int) -> int:
        """Return how many sets of inputs are needed so that none is still in L2 when it is used again."""
        size = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or L2_FALLBACK
        return max(4 * size // max(bytes_a_set, 1) + 1, 2)

    def free_bytes(self) -> int:
        """Return the bytes of free memory."""
        return torch.cuda.mem_get_info(self.device)[0]

    def share_of_copy(self, moved: float, milliseconds: float) -> float:
        """Return the bytes moved per millisecond, as a fraction of the copy's rate."""
        return moved / milliseconds / self.copy_bytes_per_ms

    def time(self, calls: Sequence[Callable[[], object]], rounds: int = ROUNDS, *, with_host: bool = False) -> float:
        """Return the median milliseconds of a call. Each call has its own set of inputs, and the calls alternate.

        The launches of a call are queued behind a pause, so only GPU time is measured. `with_host` leaves the pause out
        and measures the time a caller sees.
        """
        for call in calls:
            call()
        torch.cuda.synchronize(self.device)
        events = []
        for number in range(max(rounds, len(calls))):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if with_host:
                torch.cuda.synchronize(self.device)
            else:
                torch.cuda._sleep(HEAD_START)
            start.record()
            calls[number % len(calls)]()
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(stop) for start, stop in events)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Return the bytes that a call needs beyond those already in use."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before
