"""Sums over the processes of a data-parallel run; on one process they are the identity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Sequence


def world_size() -> int:
    """Number of processes of the default group."""
    return distributed.get_world_size() if _running() else 1


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Sum each value over all processes. Collective: every process must call it, with as many values."""
    if not _running() or not values:
        return list(values)
    reduced = torch.tensor(values, dtype=torch.float64, device=_wire_device(device))
    distributed.all_reduce(reduced)
    summed: list[float] = reduced.tolist()
    return summed


def _running() -> bool:
    return bool(distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def _wire_device(device: torch.device) -> torch.device:
    backend = str(distributed.get_backend())
    return torch.device("cpu") if backend in {"gloo", "mpi"} else device
