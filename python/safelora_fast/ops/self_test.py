"""Every backend that this machine has against the definition in float64, on small inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch

from safelora_fast.ops.backends import Backend, Operation, form, has_form
from safelora_fast.ops.feature_distance.arguments import Comparison, Normalize
from safelora_fast.ops.linear_kl.head import Head
from safelora_fast.ops.linear_kl.passes import Settings, Wanted
from safelora_fast.ops.triton_runtime import gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Check:
    """What one backend made of one operation.

    Attributes:
        operation: its name.
        backend: its name.
        device: where the tensors were.
        dtype: of the tensors.
        error: largest ‖ours − exact‖/‖exact‖ of the results; NaN where one is missing.
        tolerance: what it may be.
        failure: what was raised, if anything.
    """

    operation: Operation
    backend: Backend
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
    """Check every backend but the reference, on the CPU and on a GPU where there is one."""
    devices = [torch.device("cpu"), *(device for device in [gpu()] if device is not None)]
    for operation in get_args(Operation):
        for device in devices:
            for dtype, tolerance in TOLERANCES.items():
                tensors = _random(device, dtype)
                exact = _CASES[operation](form(operation, "reference"), tensors)
                for backend in get_args(Backend):
                    if backend == "reference" or not has_form(operation, backend):
                        continue
                    module = form(operation, backend)
                    if module.refusal([tensors(1)]) is not None:
                        continue
                    try:
                        error, failure = _error(_CASES[operation](module, tensors), exact), None
                    except Exception as raised:  # whatever it is, it is the answer
                        error, failure = float("nan"), f"{type(raised).__name__}: {raised}".splitlines()[0]
                    yield Check(operation, backend, device, dtype, error, tolerance, failure)


def _random(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """The same tensors every time, by their shape."""

    def make(*shape: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return make


def _feature_distance(module: Any, tensors: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    references = [tensors(3, 19, 70, seed=block) for block in range(2)]
    features = [block + tensors(3, 19, 70, seed=9) for block in references]
    mask = tensors(3, 19, seed=5) > -0.5
    segments = (torch.arange(19, device=mask.device) // 7).expand(3, 19)
    results = []
    for normalize in get_args(Normalize):
        comparison = Comparison(features, references, mask, normalize, segments)
        value, factors = module.forward(comparison)
        results += [value, *module.backward(comparison, factors, torch.full_like(value, 0.5))]
    return results


def _linear_kl(module: Any, tensors: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    weight = tensors(333, 8)
    results = []
    for forward in (False, True):
        settings, head = Settings(forward, 1.0), Head(weight, None, 1.0, None)
        raw, delta = tensors(5, 333, seed=1), tensors(5, 333, seed=2)
        factor = torch.full((5, 1), 0.3, dtype=torch.float32, device=raw.device)
        labels = torch.arange(5, device=raw.device)
        given = module.Passes(head, settings, 5, torch.float32).block(raw, delta, Wanted(factor, labels, factor, True))
        results += [given.divergence, given.nll, given.entropy, delta]
    return results


def _subspace_projection(module: Any, tensors: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    aligned, base, factor = tensors(96, 80), tensors(96, 80, seed=1), tensors(96, 5, seed=2)
    return [module.subspace_projection(aligned, base, factor, normalize=name) for name in ("frobenius", "spectral")]


def _subspace_projections(module: Any, tensors: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    pairs = [(tensors(rows, columns), tensors(rows, columns, seed=1)) for rows, columns in ((96, 80), (33, 50))]
    factors = [tensors(96, 17, seed=2), tensors(33, 17, seed=3)]
    inner, squares = module.transposed_products(pairs, factors)
    return [*inner, squares, *module.products(pairs, inner)]


_CASES: dict[Operation, Callable[[Any, Callable[..., torch.Tensor]], list[torch.Tensor]]] = {
    "feature_distance": _feature_distance,
    "linear_kl": _linear_kl,
    "subspace_projection": _subspace_projection,
    "subspace_projections": _subspace_projections,
}


def _error(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    errors = [
        float((mine.double() - theirs.double()).norm() / theirs.double().norm())
        for mine, theirs in zip(ours, exact, strict=True)
    ]
    return float("nan") if any(map(math.isnan, errors)) else max(errors)
