"""Project finished adapters with the vectors of a subspace: no checkpoint is needed.

Only `orthogonal`, B ← U_k·U_kᵀ·B, needs no more than U_k. The paper's cosine needs all of V, so modules cannot be
selected by it; the report has the cosine for C cut to the vectors, U_k·Σ_k²·U_kᵀ/‖V‖_F, and says so.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from safelora_fast import _core
from safelora_fast.checkpoints.experts import whole
from safelora_fast.checkpoints.sources import Checkpoint
from safelora_fast.checkpoints.tensor_names import tower_of
from safelora_fast.errors import AdapterError, CheckpointError, PairingError, SettingsError
from safelora_fast.files.digest import text_digest
from safelora_fast.projection.jobs import AdapterFactors, Group, Plan, PlannedModule, Problems, Source, raise_first
from safelora_fast.projection.model_pair import ModelPair
from safelora_fast.projection.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from safelora_fast.checkpoints.adapter import Adapter, LoraModule
    from safelora_fast.subspace.module_subspace import ModuleSubspace

STORED: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
NOTE = "the cosines are those of C cut to the subspace's vectors, not the paper's, which need both checkpoints"


class SubspacePair(ModelPair):
    """The pair of models that a subspace was built from, known by its subspace only.

    Args:
        modules: the subspace of every module, by name.
        sources: where the models came from, by role.
        find_name: returns the name of the module for an adapter's module and tower, or raises PairingError.
    """

    def __init__(
        self,
        modules: Mapping[str, ModuleSubspace],
        sources: Mapping[str, Mapping[str, Any]],
        find_name: Callable[[str, str | None], str],
    ) -> None:
        self.modules, self._find_name = modules, find_name
        super().__init__(*(_known_by_name(modules, sources.get(role, {}), role) for role in ("aligned", "base")))

    def settings(self, kind: type[Settings] = Settings, **given: Any) -> Settings:
        """Return the settings of a projection; `orthogonal` uses all vectors by default.

        Raises:
            SettingsError: the settings need more than the vectors.
        """
        built = max((module.rank for module in self.modules.values()), default=0)
        if given.get("operator") == "orthogonal" and given.get("rank") is None and given.get("energy") is None:
            given["rank"] = max(built, 1)
        chosen = kind(**given)
        if chosen.operator != "orthogonal":
            raise SettingsError(f"operator {chosen.operator} needs both checkpoints; with a subspace, use orthogonal")
        if chosen.select != "all":
            raise SettingsError("a subspace cannot select by the paper's cosine, which needs all of V; use select all")
        if chosen.rank is not None and chosen.rank > built:
            raise SettingsError(
                f"rank {chosen.rank} is more than the subspace has, {built}; build it with a higher rank"
            )
        return chosen

    def identity(self) -> dict[str, str]:
        """Return a digest of the vectors."""
        found = hashlib.sha256()
        for name, module in sorted(self.modules.items()):
            found.update(text_digest([name, module.v_norm, module.columns, module.left_vectors.shape]).encode())
            found.update(np.ascontiguousarray(module.left_vectors).tobytes())
            found.update(np.ascontiguousarray(module.singular_values).tobytes())
        return {"subspace": found.hexdigest()}

    def plan(self, adapters: Sequence[Adapter]) -> Plan:
        """Pair the modules of adapters with modules of the subspace.

        Raises:
            PairingError: a module is not in the subspace, or its shape differs.
        """
        groups: dict[str, Group] = {}
        problems: Problems = []
        for index, adapter in enumerate(adapters):
            tower = tower_of(adapter.config)
            for module in adapter.modules:
                try:
                    self._pair(index, module, tower, groups)
                except PairingError as problem:
                    problems.append((module.name, problem))
        raise_first(problems, len(groups))
        order = [name for name in self.modules if name in groups]
        planned = tuple(_Module(groups[name], None) for name in order)  # type: ignore[arg-type]  # no stream reads the job
        return Plan(planned, tuple(adapters), sum(self.modules[name].left_vectors.nbytes for name in order))

    def start(self, plan: Plan, settings: Settings, *, keep_projected: bool) -> VectorStream:
        """Start the stream over a plan."""
        del keep_projected  # computed when it is asked for
        return VectorStream(plan, settings, self.modules)

    def _pair(self, index: int, module: LoraModule, tower: str | None, groups: dict[str, Group]) -> None:
        if module.kind == "parameter":
            raise PairingError(f"{module.name}: factors of experts need both checkpoints; they are not in a subspace")
        name = self._find_name(module.name, tower)
        found = self.modules[name]
        lora_b, lora_a = whole(module.lora_b_key, module.lora_b_shape), whole(module.lora_a_key, module.lora_a_shape)
        shape = len(found.left_vectors), found.columns
        if shape != (lora_b.rows, lora_a.cols):
            raise PairingError(
                f"{module.name}: the adapter's update is {[lora_b.rows, lora_a.cols]}, but V of {name} is {list(shape)}"
            )
        group = groups.setdefault(name, Group(name, (), (), shape, transposed=False))
        if group.factors and group.factors[-1].adapter == index:
            other = group.factors[-1].module.name
            raise PairingError(f"{module.name}: this module and {other} of the adapter both belong to {name}")
        group.factors.append(AdapterFactors(index, module, lora_b, lora_a))


class _Module(PlannedModule):
    """A module whose V is known by its vectors: nothing is read for it."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """The tensor that V belongs to, in files that are not here."""
        tensor = f"{self.name}.weight"
        return (Source(tensor, tensor, "", ""),)


class VectorStream:
    """Projects the factors of a plan's modules onto U_k, in order."""

    def __init__(self, plan: Plan, settings: Settings, modules: Mapping[str, ModuleSubspace]) -> None:
        self.nbytes, self.bytes_done = plan.nbytes, 0
        self._plan, self._settings, self._modules = plan, settings, modules

    def __iter__(self) -> Iterator[VectorOutcome]:
        for index, planned in enumerate(self._plan.modules):
            module = self._modules[planned.name]
            vectors, values = leading(planned.name, module, self._settings)
            factors = [
                VectorFactors(self._plan.adapters[one.adapter], one, vectors, values, module.v_norm, self._settings)
                for one in planned.group.factors
            ]
            energy = float(np.square(values).sum()) / module.v_norm**2 if module.v_norm else None
            self.bytes_done += module.left_vectors.nbytes
            yield VectorOutcome(index, module.v_norm, len(values), energy, factors)

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class VectorOutcome:
    """The outcome of one module, with the attributes of `_core.JobOutcome`."""

    index: int
    v_norm: float
    rank: int
    energy: float | None
    factors: list[VectorFactors]


class VectorFactors:
    """Factors of one adapter in one module, with the attributes of `_core.FactorOutcome`. Metrics are float64.

    Args:
        adapter, factors: B [m, r] and A [r, n].
        vectors, values: U_k [m, k] float32 and σ_k [k] float64.
        v_norm: ‖V‖_F.
        settings: the number of threads.

    Raises:
        CheckpointError: a factor is NaN or infinite.
    """

    def __init__(
        self,
        adapter: Adapter,
        factors: AdapterFactors,
        vectors: np.ndarray,
        values: np.ndarray,
        v_norm: float,
        settings: Settings,
    ) -> None:
        self._file, self._key, self._vectors, self._threads = (
            adapter.file,
            factors.lora_b.key,
            vectors,
            settings.threads,
        )
        self._dtype, self._shape = self._file.tensors[self._key][:2]
        lora_b, lora_a = _read(self._file, self._key), _read(self._file, factors.lora_a.key)
        gram = lora_a @ lora_a.T  # [r, r]
        inside = vectors.T.astype(np.float64) @ lora_b if v_norm else lora_b  # [k, r]; without V, B stays
        kept = values[:, None] ** 2 * inside if v_norm else lora_b
        self.lora_b_norm, self.lora_b_norm_projected = (float(np.linalg.norm(one)) for one in (lora_b, inside))
        self.update_norm, self.update_norm_projected, norm = (_update(one, one, gram) for one in (lora_b, inside, kept))
        self.gain = self.lora_b_norm_projected / self.lora_b_norm if self.update_norm else math.nan
        known = bool(v_norm and norm and self.update_norm)
        self.cosine = _update(kept, inside, gram) ** 2 / norm / self.update_norm if known else math.nan

    def projected(self) -> bytes:
        """Return U_k·U_kᵀ·B, (m, r) row-major, in the stored dtype of B.

        Raises:
            AdapterError: a value leaves the range of that dtype.
        """
        content = self._file.read(self._key)
        if not self._vectors.shape[1]:
            return content
        stored = np.frombuffer(content, np.uint8)
        # V·Vᵀ·B/‖V‖_F is U·Uᵀ·B for V = ‖U‖_F·U: one rounding, to the dtype of B.
        v = np.ascontiguousarray(self._vectors * np.float32(np.linalg.norm(self._vectors.astype(np.float64))))
        zero, result = np.zeros_like(v), np.empty_like(stored)
        weights = [(one.ctypes.data, "F32", *v.shape, v.shape[1]) for one in (v, zero)]
        blocks = [(one.ctypes.data, self._dtype, *self._shape, self._shape[1], 1) for one in (stored, result)]
        try:
            _core.subspace_projection(*weights, *blocks, threads=self._threads)
        except ValueError as error:
            raise AdapterError(
                f"{self._file.path}: tensor {self._key!r}, once projected: {error}; store the adapter in float32"
            ) from error
        return bytes(result)

    def projected_lora_a(self) -> None:
        """A stays."""


def _update(left: np.ndarray, right: np.ndarray, gram: np.ndarray) -> float:
    """Return the root of the inner product of left·A and right·A, with A·Aᵀ = gram."""
    return math.sqrt(max(float(((left.T @ right) * gram).sum()), 0.0))


def _read(file: _core.SafetensorsFile, key: str) -> np.ndarray:
    """Return a factor in float64."""
    dtype, shape = file.tensors[key][:2]
    stored = np.frombuffer(file.read(key), STORED[dtype])
    if dtype == "BF16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    values: np.ndarray = stored.astype(np.float64).reshape(shape)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{file.path}: tensor {key!r} holds NaN or Inf; the adapter is damaged")
    return values


def leading(name: str, module: ModuleSubspace, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors [m, k] and singular values [k] that the rank or the energy asks for."""
    values = module.singular_values.astype(np.float64)
    count = min(settings.rank or len(values), len(values))
    if settings.energy is not None and module.v_norm:
        shares = np.cumsum(np.square(values / module.v_norm))
        enough = np.flatnonzero(shares >= settings.energy - 1e-6)
        if not len(enough):
            raise SettingsError(
                f"energy {settings.energy:g} is more than the subspace keeps of {name}, {shares[-1]:.4f}; build it with more"
            )
        count = int(enough[0]) + 1
    return module.left_vectors[:, :count], values[:count]


def _known_by_name(modules: Iterable[str], source: Mapping[str, Any], role: str) -> Checkpoint:
    """Return a checkpoint with the names of the subspace's modules, whose tensors cannot be read."""

    def absent(_: str) -> Path:
        raise CheckpointError("the subspace has no other weights of the model")

    names = {f"{name}.weight": "" for name in modules}
    shown = str(source.get("source") or f"the {role} model of the subspace")
    note = NOTE if role == "aligned" else None
    return Checkpoint(shown, source.get("revision"), None, names, absent, remote=True, beside=note)
