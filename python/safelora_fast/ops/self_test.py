"""Self-test: compare every backend on this machine with the float64 oracle, on the examples of each operation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from safelora_fast.ops import OPS
from safelora_fast.ops.base import BackendName, gpu, outcomes, served_by

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from safelora_fast.ops.base import Op

TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Check:
    """Result of one backend on one operation.

    Attributes:
        operation: name of the operation.
        backend: name of the backend.
        device: device of the tensors.
        dtype: dtype of the tensors.
        error: largest ‖ours − exact‖/‖exact‖ of the results; NaN if one is missing.
        tolerance: largest error allowed.
        failure: the exception, if one was raised.
    """

    operation: str
    backend: BackendName
    device: torch.device
    dtype: torch.dtype
    error: float
    tolerance: float
    failure: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.error <= self.tolerance


def run_checks() -> Iterator[Check]:
    """Check every backend except the oracle, on the CPU and on a GPU if there is one."""
    devices = [torch.device("cpu"), *(device for device in [gpu()] if device is not None)]
    for op in OPS:
        for device in devices:
            for dtype, tolerance in TOLERANCES.items():
                make = random_tensors(device, dtype)
                exact = _results(op, "reference", make)
                for name in op.names[1:]:
                    if op.backend(name).unsupported_reason([make(1)]) is not None:
                        continue
                    try:
                        error, failure = largest_error(_results(op, name, make), exact), None
                    except Exception as raised:  # any exception is a result
                        error, failure = math.nan, f"{type(raised).__name__}: {raised}".splitlines()[0]
                    yield Check(op.name, name, device, dtype, error, tolerance, failure)


def random_tensors(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Return a function that makes the same random tensor for the same shape and seed."""

    def make(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)

    return make


def largest_error(ours: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Return the largest ‖ours − exact‖/‖exact‖; NaN if one of them is NaN."""
    errors = [
        float((mine.double() - theirs.double()).norm() / theirs.double().norm())
        for mine, theirs in zip(ours, exact, strict=True)
    ]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _results(op: Op, backend: BackendName, make: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    with served_by(backend):
        return [result for example in op.examples(make) for result in outcomes(example)]
