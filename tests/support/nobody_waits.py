"""A dispatch mode that forbids device synchronization, as during the capture of a CUDA graph."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NobodyWaits(TorchDispatchMode):
    """Raises if the host needs the size or value of a result, or if data is copied between host and device."""

    WAITING = ("nonzero", "_local_scalar_dense", "item", "masked_select", "unique", "is_nonzero", "equal", "lift_fresh")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        indices = args[1] if name == "index" else ()
        assert name not in self.WAITING, name
        assert not any(index is not None and index.dtype == torch.bool for index in indices)
        return function(*args, **(kwargs or {}))
