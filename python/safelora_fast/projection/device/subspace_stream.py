"""U_k, σ_k and ‖V‖_F of each module of a plan on a torch device, as from `_core.ProjectionStream` with `orthogonal`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from safelora_fast.projection.device.factors import damage
from safelora_fast.projection.device.leading_vectors import Extent, leading_vectors
from safelora_fast.projection.device.reader import BATCH_BYTES, Wanted
from safelora_fast.projection.device.stream import BatchStream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safelora_fast.projection.device.reader import Pair
    from safelora_fast.projection.jobs import Plan
    from safelora_fast.projection.settings import Settings

ELEMENTS = 1 << 22  # elements of V that are squared at a time
HEADROOM = 8  # a vector of n normal numbers has a norm below 8·√n; V scales it by at most ‖V‖


@dataclass(frozen=True)
class DeviceSubspace:
    """The subspace of one module on the CPU, with the attributes of `_core.JobOutcome`.

    `vectors` is U_k [m, k] float32, and the largest element of each vector is positive. `values` is σ_k [k] float64 in
    descending order.
    """

    index: int
    v_norm: float
    vectors: torch.Tensor
    values: torch.Tensor

    def left_vectors(self) -> bytes:
        """Return U_kᵀ, (k, m) row-major, float32."""
        return bytes(self.vectors.mT.contiguous().view(torch.uint8).numpy())

    def singular_values(self) -> list[float]:
        """Return σ_k in descending order."""
        found: list[float] = self.values.tolist()
        return found


class SubspaceStream(BatchStream[DeviceSubspace]):
    """Computes the subspaces of a plan's modules on a device, in order.

    Args:
        plan: the plan with the modules.
        settings: the rank or energy, and the number of reader threads.
        device, batch_bytes: see :class:`BatchStream`.
        seed: seed of the random start.
    """

    def __init__(
        self, plan: Plan, settings: Settings, *, device: torch.device, seed: int, batch_bytes: int = BATCH_BYTES
    ) -> None:
        self._extent, self._seed = Extent(settings.rank, settings.energy), seed
        modules = [Wanted(index, planned) for index, planned in enumerate(plan.modules)]
        super().__init__(modules, self._found, device=device, threads=settings.threads, batch_bytes=batch_bytes)

    def _found(self, batch: list[Pair]) -> Iterator[DeviceSubspace]:
        for pair in batch:
            norm = _norm(pair)
            rows, columns = pair.aligned.shape
            if not norm * HEADROOM * max(rows, columns) ** 0.5 < torch.finfo(torch.float32).max:
                raise damage(pair)
            index = pair.wanted.index
            if norm == 0:
                yield DeviceSubspace(index, 0.0, torch.empty(rows, 0), torch.empty(0, dtype=torch.float64))
                continue
            found = leading_vectors((pair.aligned, pair.base), self._extent, seed=self._seed, squares=norm**2)
            yield DeviceSubspace(index, norm, _with_signs(found.vectors.cpu()), found.values)


def _norm(pair: Pair) -> float:
    """Compute ‖V‖_F a few rows at a time, with squares in float64 to avoid overflow."""
    rows = max(ELEMENTS // pair.aligned.shape[1], 1)
    norms = [
        torch.linalg.vector_norm(aligned.float() - base.float(), dtype=torch.float64)
        for aligned, base in zip(pair.aligned.split(rows), pair.base.split(rows), strict=True)
    ]
    return math.sqrt(float(torch.stack(norms).square().sum()))


def _with_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Flip signs so that the element with the largest magnitude in each vector is positive."""
    largest = vectors.abs().argmax(0, keepdim=True)
    return vectors * vectors.gather(0, largest).sign()
