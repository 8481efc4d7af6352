"""SafeMERGE (arXiv 2503.17239): replace selected modules by a weighted sum with a safety-tuned adapter.

Adding lora_B and lora_A of two adapters separately leaves cross terms. The sum of the updates is exact in the rank of
both together, [w·B, c·B_safe]·[A; A_safe]. Its nearest matrix of the adapter's own rank r, by the singular values of
the small core, keeps shapes and configuration. What is cut off is reported as the error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from safelora_fast.checkpoints.adapter import load_adapter
from safelora_fast.checkpoints.experts import whole
from safelora_fast.checkpoints.lora_config import scaling
from safelora_fast.checkpoints.tensor_names import canonical
from safelora_fast.errors import AdapterError, PairingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safelora_fast.checkpoints.adapter import Adapter, LoraModule
    from safelora_fast.checkpoints.experts import Slice
    from safelora_fast.projection.jobs import AdapterFactors, Plan, Start, Stream
    from safelora_fast.projection.settings import Settings
    from safelora_fast.projection.writer import FactorOutcome

STORED: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def starting(start: Start) -> Start:
    """Return a start whose stream merges if the operator is "merge"; the other operators start as before."""

    def merged(plan: Plan, settings: Settings, *, keep_projected: bool) -> Stream:
        if settings.operator != "merge" or settings.safe_adapter is None:
            return start(plan, settings, keep_projected=keep_projected)
        safe = load_adapter(settings.safe_adapter)
        partners = _partners(plan, safe)
        only_cosines = replace(settings, operator="zero", weight=None, safe_adapter=None)
        return _Merged(
            start(plan, only_cosines, keep_projected=False), plan, safe, partners, float(settings.weight or 0)
        )

    return merged


def _partners(plan: Plan, safe: Adapter) -> dict[str, LoraModule]:
    """Return the module of the safe adapter for each adapted module, by the name in the adapters.

    Raises:
        PairingError: the safe adapter lacks a module, or it has another shape.
    """
    known = {canonical(f"{module.name}.weight"): module for module in safe.modules}
    found: dict[str, LoraModule] = {}
    for planned in plan.modules:
        for factors in planned.group.factors:
            name = factors.module.name
            partner = known.get(canonical(f"{name}.weight"))
            if partner is None or partner.kind != factors.module.kind or partner.kind == "parameter":
                raise PairingError(
                    f"{name}: the safe adapter {safe.path} has no such module to merge with, or it holds factors of experts; "
                    f"exclude it with --exclude {name}"
                )
            shape = partner.lora_b_shape[0], partner.lora_a_shape[1]
            if shape != (factors.lora_b.rows, factors.lora_a.cols):
                raise PairingError(
                    f"{name}: the update is {[factors.lora_b.rows, factors.lora_a.cols]}, and {list(shape)} in the safe adapter "
                    f"{safe.path}"
                )
            found[name] = partner
    return found


class _Merged:
    """The outcomes of another stream, with merged factors."""

    def __init__(
        self, stream: Stream, plan: Plan, safe: Adapter, partners: dict[str, LoraModule], weight: float
    ) -> None:
        self._stream, self._plan, self._safe, self._partners, self._weight = stream, plan, safe, partners, weight

    def __iter__(self) -> Iterator[Any]:
        for outcome in self._stream:
            pairs = zip(self._plan.modules[outcome.index].group.factors, outcome.factors, strict=True)
            factors = [self._merged(own, found) for own, found in pairs]
            yield _Outcome(outcome.index, outcome.v_norm, factors)

    @property
    def nbytes(self) -> int:
        return self._stream.nbytes

    @property
    def bytes_done(self) -> int:
        return self._stream.bytes_done

    def close(self) -> None:
        self._stream.close()

    def _merged(self, own: AdapterFactors, found: FactorOutcome) -> MergedFactors:
        adapter, partner = self._plan.adapters[own.adapter], self._partners[own.module.name]
        share = (1 - self._weight) * scaling(partner.name, self._safe.config) / scaling(own.module.name, adapter.config)
        others = (
            whole(partner.lora_b_key, partner.lora_b_shape),
            whole(partner.lora_a_key, partner.lora_a_shape),
        )
        merged, error = merge(
            (self._weight, _values(adapter, own.lora_b), _values(adapter, own.lora_a)),
            (share, _values(self._safe, others[0]), _values(self._safe, others[1])),
        )
        blocks = [(adapter, own.lora_b), (adapter, own.lora_a)]
        norm = float(np.linalg.norm(_core_of(*merged)))
        gain = norm / found.update_norm if found.update_norm else math.nan
        return MergedFactors(
            found.cosine,
            gain,
            found.lora_b_norm,
            float(np.linalg.norm(merged[0])),
            found.update_norm,
            norm,
            error,
            [_Rounded(*block, values) for block, values in zip(blocks, merged, strict=True)],
        )


def merge(
    *updates: tuple[float, np.ndarray, np.ndarray],
) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """Return B' [m, r] and A' [r, n] nearest to Σ w·B·A, with the first update's rank r, and the relative error.

    Args:
        updates: for each update its weight w, B [m, r] and A [r, n], float64.
    """
    left = np.hstack([weight * lora_b for weight, lora_b, _ in updates])
    right = np.vstack([lora_a for _, _, lora_a in updates])
    (q_left, r_left), (q_right, r_right) = np.linalg.qr(left), np.linalg.qr(right.T)
    u, values, w = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    rank = updates[0][1].shape[1]
    roots = np.sqrt(values[:rank])
    lora_b, lora_a = np.zeros((len(left), rank)), np.zeros((rank, right.shape[1]))
    lora_b[:, : len(roots)] = q_left @ u[:, :rank] * roots
    lora_a[: len(roots)] = (q_right @ w[:rank].T * roots).T
    total = float(np.linalg.norm(values))
    return (lora_b, lora_a), float(np.linalg.norm(values[rank:])) / total if total else 0.0


def _core_of(lora_b: np.ndarray, lora_a: np.ndarray) -> np.ndarray:
    """Return a small matrix with the norm of B·A."""
    core: np.ndarray = np.linalg.qr(lora_b)[1] @ np.linalg.qr(lora_a.T)[1].T
    return core


def _values(adapter: Adapter, block: Slice) -> np.ndarray:
    """Return a factor in float64. The safe adapter's must be finite; the stream has checked the others."""
    dtype = adapter.file.tensors[block.key][0]
    stored = np.frombuffer(adapter.file.read(block.key), STORED[dtype])
    if dtype == "BF16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    strides = block.row_stride * stored.itemsize, block.col_stride * stored.itemsize
    values = np.lib.stride_tricks.as_strided(stored[block.offset :], (block.rows, block.cols), strides, writeable=False)
    if not np.isfinite(values).all():
        raise AdapterError(f"{adapter.file.path}: tensor {block.key!r} holds NaN or Inf; the adapter is damaged")
    return values.astype(np.float64)


@dataclass(frozen=True)
class _Outcome:
    """The outcome of one module, with the attributes of `_core.JobOutcome`."""

    index: int
    v_norm: float
    factors: list[MergedFactors]
    rank: None = None
    energy: None = None


@dataclass(frozen=True)
class _Rounded:
    """A factor to be stored like a block of an adapter."""

    adapter: Adapter
    block: Slice
    values: np.ndarray

    def stored(self) -> bytes:
        """Return the values in the stored dtype.

        Raises:
            AdapterError: a value leaves the range of the dtype.
        """
        dtype = self.adapter.file.tensors[self.block.key][0]
        with np.errstate(over="ignore"):
            values = self.values.astype(np.float16 if dtype == "F16" else np.float32)
        if dtype == "BF16":
            bits = values.view(np.uint32)
            rounded = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype("<u2")  # to nearest, ties to even
            values = (rounded.astype(np.uint32) << 16).view(np.float32)
        if not np.isfinite(values).all():
            raise AdapterError(
                f"{self.adapter.file.path}: tensor {self.block.key!r}, once merged, leaves the range of {dtype}; store the "
                "adapter in float32"
            )
        return rounded.tobytes() if dtype == "BF16" else values.astype(STORED[dtype]).tobytes()


@dataclass(frozen=True)
class MergedFactors:
    """Factors of one adapter in one module, with the attributes of `_core.FactorOutcome`.

    The gain is that of the update, ‖B'·A'‖/‖B·A‖, since B alone has no scale of its own here. `error` is the norm of
    what the cut to rank r lost, relative to the merged update.
    """

    cosine: float
    gain: float
    lora_b_norm: float
    lora_b_norm_projected: float
    update_norm: float
    update_norm_projected: float
    error: float
    factors: list[_Rounded]

    def projected(self) -> bytes:
        """Return B' as stored."""
        return self.factors[0].stored()

    def projected_lora_a(self) -> bytes:
        """Return A' as stored."""
        return self.factors[1].stored()
