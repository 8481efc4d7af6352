"""Cache of plans for grouped Triton launches and their uploads. A plan is valid while the operands stay in place."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from safelora_fast.ops.cuda_runtime import is_captured

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    import numpy as np

KEPT = 16  # as in rust/cuda/src/subspace_projection.rs
ALIGNMENT = 256  # bytes
SPARE = 1 << 20  # bytes

Plan = TypeVar("Plan")


class Plans(Generic[Plan]):
    """The most recently used plans, and the plans that CUDA graphs read at every replay.

    A plan belongs to one stream: on another stream its tables could be read before the upload, or overwritten during
    use.

    Attributes:
        recent: plans by stream and name, the latest last.
        captured: plans kept forever.
    """

    def __init__(self) -> None:
        self.recent: OrderedDict[tuple[Hashable, Hashable], Plan] = OrderedDict()
        self.captured: list[Plan] = []

    def find(self, name: Hashable, device: torch.device, make: Callable[[], Plan]) -> Plan:
        """Return the plan of this name for the device's current stream, calling `make` if there is none."""
        key, in_graph = (current_stream(device), name), is_captured(device)
        plan = self.recent.pop(key, None)
        if plan is None and in_graph:
            # Uploaded before the capture began, which waited for the device.
            plan = next((other for (_, known), other in self.recent.items() if known == name), None)
            if plan is None:
                # The graph uploads it when it runs, so nothing else can use it.
                plan = make()
                self.captured.append(plan)
                return plan
        if plan is None:
            plan = make()
        if in_graph and not any(known is plan for known in self.captured):
            self.captured.append(plan)
        self.recent[key] = plan
        if len(self.recent) > KEPT:
            self.recent.popitem(last=False)
        return plan


def uploaded(arrays: Sequence[np.ndarray], device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Copy arrays to a device in one transfer; on a CUDA device the host does not wait for it.

    Returns:
        The tensors, each at a multiple of ALIGNMENT, and the host memory, which a graph copies from at every replay.
    """
    is_pinned = device.type == "cuda"
    *starts, size = itertools.accumulate([-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays], initial=0)
    host = _pinned(size, is_captured(device)) if is_pinned else torch.empty(size, dtype=torch.uint8)
    for start, array in zip(starts, arrays, strict=True):
        host.numpy()[start : start + array.nbytes] = array.reshape(-1).view("uint8")
    there = host.to(device, non_blocking=is_pinned)
    tensors = [
        there[start : start + array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]
    return tensors, host


# Pinned memory for uploads in CUDA graphs: older torch cannot allocate it during capture.
_spare: list[torch.Tensor] = []


def _pinned(size: int, in_graph: bool) -> torch.Tensor:
    if in_graph and _spare and len(_spare[0]) >= size:
        host, _spare[0] = _spare[0][:size], _spare[0][size:]
        return host
    if not in_graph and (not _spare or len(_spare[0]) < SPARE // 2):
        _spare[:] = [torch.empty(SPARE, dtype=torch.uint8, pin_memory=True)]
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def current_stream(device: torch.device) -> Hashable:
    """Return the current stream of a GPU; None on the CPU."""
    found: Hashable = None if device.type == "cpu" else getattr(torch, device.type).current_stream(device)
    return found
