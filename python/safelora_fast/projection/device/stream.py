"""Projection streams on a torch device: `_core.ProjectionStream` with the grouped operations of ops/.

Sums are float32, so metrics agree with those of the extension to about 1e-6, but not bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from safelora_fast.errors import BackendError, SettingsError
from safelora_fast.projection.device.factors import FactorReader
from safelora_fast.projection.device.outcomes import BatchProjector, DeviceOutcome
from safelora_fast.projection.device.reader import BATCH_BYTES, Wanted, WeightReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from safelora_fast.projection.device.reader import Pair
    from safelora_fast.projection.jobs import Plan
    from safelora_fast.projection.settings import Settings

DEVICES = ("cpu", "cuda", "xpu")
Outcome = TypeVar("Outcome")


class BatchStream(Generic[Outcome]):
    """Applies a function to batches of modules on a device, in order, while the next batch is read.

    The device holds the weights of one batch, and the host those of two. The function's own memory is extra.

    Args:
        modules: the modules in the order of the plan.
        work: a function that returns the outcomes of a batch, in its order.
        device: the device, from :func:`torch_device`.
        threads: the number of threads that read.
        batch_bytes: the largest size of a batch, unless one module is larger.
    """

    def __init__(
        self,
        modules: Sequence[Wanted],
        work: Callable[[list[Pair]], Iterable[Outcome]],
        *,
        device: torch.device,
        threads: int | None,
        batch_bytes: int,
    ) -> None:
        self.nbytes = sum(wanted.nbytes for wanted in modules)
        self.bytes_done = 0
        self._work, self._device = work, device
        self._reader = WeightReader(modules, device, threads=threads, batch_bytes=batch_bytes)

    def __iter__(self) -> Iterator[Outcome]:
        """Yield the outcomes. Work on a batch starts when its first outcome is requested.

        Raises:
            CheckpointError: a weight is NaN or infinite, or too large for products in float32.
            BackendError: the device has too little memory.
        """
        try:
            yield from self._outcomes()
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"device {str(self._device)!r} ran out of memory ({_first_line(error)}); leave device out to compute on the CPU"
            ) from error

    def close(self) -> None:
        """Stop reading."""
        self._reader.close()

    def _outcomes(self) -> Iterator[Outcome]:
        for batch in self._reader:
            sizes, outcomes = [pair.wanted.nbytes for pair in batch], self._work(batch)
            del batch  # free its memory for the next one
            for size, outcome in zip(sizes, outcomes, strict=True):
                self.bytes_done += size
                yield outcome


class DeviceStream(BatchStream[DeviceOutcome]):
    """Projects the modules of a plan on a device, in order.

    Args:
        plan: the plan with the modules.
        settings: the settings of the projection, including the number of reader threads.
        device, batch_bytes: see :class:`BatchStream`.
        keep_projected: whether to keep the projected factors.
        resident: aligned weights already on the device, in their stored orientation, by module name in the plan.
    """

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        *,
        device: torch.device,
        keep_projected: bool,
        resident: Mapping[str, torch.Tensor] | None = None,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:
        modules = [
            Wanted(index, planned, (resident or {}).get(planned.name)) for index, planned in enumerate(plan.modules)
        ]
        projector = BatchProjector(FactorReader(plan.adapters, device), settings, keep_projected=keep_projected)
        super().__init__(modules, projector.run, device=device, threads=settings.threads, batch_bytes=batch_bytes)


def torch_device(name: str | torch.device) -> torch.device:
    """Return the device of this name, with its index.

    Raises:
        SettingsError: torch does not know the device, or its type is not supported.
        BackendError: this machine has no such device.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise SettingsError(
            f"device must be one of {', '.join(DEVICES)}, with a number if need be, not {name!r}"
        ) from None
    if device.type not in DEVICES:
        raise SettingsError(f"device must be one of {', '.join(DEVICES)}, not {name!r}: nothing is computed there")
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # a missing CUDA build, driver or GPU: each raises another type
        raise BackendError(
            f"device {name!r} cannot be used ({_first_line(error)}); leave device out to compute on the CPU"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
