"""Collective operations of a data-parallel run; with one process they do nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Result = TypeVar("Result")


def world_size() -> int:
    """Return the number of processes in the default group."""
    return distributed.get_world_size() if _running() else 1


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Sum each value over all processes. Collective: every process must call it, with the same number of values."""
    if not _running() or not values:
        return list(values)
    reduced = torch.tensor(values, dtype=torch.float64, device=_wire_device(device))
    distributed.all_reduce(reduced)
    summed: list[float] = reduced.tolist()
    return summed


def on_first_rank(work: Callable[[], Result]) -> Result:
    """Run `work` on process 0; every process returns its result or raises its exception. Collective."""
    if not _running():
        return work()
    outcome: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # the other processes wait for it
            outcome[1] = error
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result


def broadcast_from_first(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return process 0's tensor, bit for bit, on every process. Collective; `device` is the compute device."""
    if not _running():
        return tensor
    sent = tensor.to(_wire_device(device)).contiguous()
    # Sent as bytes, because no backend supports every dtype.
    distributed.broadcast(sent.view(torch.uint8), src=0)
    return sent


def _running() -> bool:
    return bool(distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def _wire_device(device: torch.device) -> torch.device:
    """Return the device that the backend sends from: accelerator backends do not send CPU tensors."""
    if str(distributed.get_backend()) in {"gloo", "mpi"}:
        return torch.device("cpu")
    if device.type == "cpu" and torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None  # noqa: S101
        return torch.device(kind.type, torch.accelerator.current_device_index())
    return device
