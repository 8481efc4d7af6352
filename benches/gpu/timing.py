"""Times on a GPU: by events, with inputs that no cache holds, beside the rate of a copy measured in the same run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROUNDS = 20
L2_FALLBACK = 128 << 20
HEAD_START = 40_000_000  # cycles, some 20 ms: more than the host needs to launch what is measured
COPIED = 1 << 30


@dataclass
class Timer:
    """Takes medians of milliseconds on one device.

    Attributes:
        device: the GPU.
        copy_bytes_per_ms: bytes read and written by a large copy.
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
        """How many sets of inputs it takes for none to be in L2 when it is its turn again."""
        size = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or L2_FALLBACK
        return max(4 * size // max(bytes_a_set, 1) + 1, 2)

    def free_bytes(self) -> int:
        """Memory that is left."""
        return torch.cuda.mem_get_info(self.device)[0]

    def share_of_copy(self, moved: float, milliseconds: float) -> float:
        """Bytes moved a millisecond, as a fraction of what the copy moves."""
        return moved / milliseconds / self.copy_bytes_per_ms

    def time(self, calls: Sequence[Callable[[], object]], rounds: int = ROUNDS, *, with_host: bool = False) -> float:
        """Median milliseconds of a call; each has a set of inputs of its own, and they take turns.

        The launches of a call queue up behind a pause, so that the time is that of the GPU; `with_host` leaves the pause
        out, and the time is what a caller sees who has nothing else to do.
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
        """Memory that a call needs beyond what was there before."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before
