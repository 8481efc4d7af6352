"""The safe subspace of a pair of checkpoints: for each module the leading left singular vectors of aligned − base."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from safelora_fast.checkpoints.provenance import check_source
from safelora_fast.checkpoints.tensor_names import NameIndex
from safelora_fast.errors import CheckpointError, OutputError, PairingError
from safelora_fast.files.json_reader import (
    COUNT,
    LIST,
    NUMBER,
    OBJECT,
    REAL,
    TEXT,
    Kind,
    check_fields,
    check_regular,
    parse_json,
)
from safelora_fast.files.output import whole_file
from safelora_fast.files.progress import bar_on_a_terminal

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from safelora_fast.projection.project import Progress

FORMAT = "safelora_fast.subspace.safe_subspace"
VERSION = 1
_VECTORS, _VALUES = ".left_vectors", ".singular_values"
_NORM = Kind("a finite number from 0", lambda value: NUMBER.fits(value) and value >= 0)
_MODULE = {"name": TEXT, "v_norm": _NORM, "columns": COUNT}


@dataclass(frozen=True)
class ModuleSubspace:
    """The subspace of one module, with V = aligned − base of shape (m, n).

    Attributes:
        left_vectors: U_k [m, k], float32, orthonormal columns.
        singular_values: σ_k [k], float32, descending.
        v_norm: ‖V‖_F.
        columns: n.
    """

    left_vectors: np.ndarray
    singular_values: np.ndarray
    v_norm: float
    columns: int

    @property
    def rank(self) -> int:
        """Number of vectors k; 0 where V is zero."""
        return int(self.left_vectors.shape[1])

    @property
    def spectral_norm(self) -> float:
        """σ₁, the largest singular value of V; 0 where V is zero."""
        return float(self.singular_values[0]) if self.rank else 0.0

    @property
    def energy(self) -> float:
        """Share of ‖V‖²_F that the subspace holds; NaN where V is zero."""
        if self.v_norm == 0:
            return float("nan")
        kept = float(np.square(self.singular_values.astype(np.float64)).sum())
        return kept / self.v_norm / self.v_norm  # the square of a large norm is beyond float64

    def __repr__(self) -> str:
        shape = f"({self.left_vectors.shape[0]}, {self.columns})"
        return (
            f"ModuleSubspace(V of shape {shape}, rank={self.rank}, v_norm={self.v_norm:.4g}, energy={self.energy:.4g})"
        )


@dataclass(frozen=True)
class SafeSubspace:
    """U_k, σ_k and ‖V‖_F of every module of a pair of checkpoints, with the sources that they came from.

    Attributes:
        modules: by module name, as in the aligned checkpoint ("model.layers.0.self_attn.q_proj").
        sources: "aligned" and "base", each with its source (absolute path or Hub id), its revision (the commit, on the
            Hub) and, on disk, name, size and fingerprint of its files; checkpoints/provenance.py defines the fingerprint.
        settings: what it was built with: rank or energy, seed, modules, and the version of this package; where a device
            built it, its kind ("cuda") and the version of torch too.
    """

    modules: Mapping[str, ModuleSubspace]
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        ranks = {module.rank for module in self.modules.values()} or {0}
        rank = str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
        names = {
            role: Path(str(source["source"])).name for role, source in self.sources.items() if source.get("source")
        }
        pair = "".join(f", {role}={name!r}" for role, name in names.items())
        return f"SafeSubspace({len(self.modules)} modules, rank {rank}{pair})"

    @classmethod
    def build(
        cls,
        *,
        aligned: str | Path,
        base: str | Path,
        modules: Sequence[str] | None = None,
        rank: int | None = None,
        energy: float | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        threads: int | None = None,
        device: str | None = None,
        progress: Progress | bool | None = None,
    ) -> SafeSubspace:
        """Build from two checkpoints by a randomised block Krylov iteration (Halko et al. 2011, arXiv 0909.4061).

        The checkpoints are streamed once, in parallel with the work, and no model is loaded. Weights are paired by
        name as in a projection, so that the two may be sharded, fused, spelled and typed differently. The same input
        and seed give the same bytes, whatever the number of threads.

        With a `device` the same iteration runs there by torch, a module at a time, while the next 512 MiB of weights are
        read; the device holds such a batch (or both weights of one module where they are larger), and the basis and its
        products. Singular values agree with those of the CPU to about 1e-5 of σ₁, U_k·U_kᵀ to about 1e-5·σ₁/(σ_k − σ_k+1),
        to which both are computed; bytes depend on the device and on the version of torch. Which way is faster has not been
        measured.

        Args:
            aligned: the aligned (instruct) model: path or Hub id, with `@revision` if need be.
            base: the model before alignment, likewise.
            modules: last components of module names ("q_proj", "mlp.down_proj"), experts, embeddings and parts of fused
                weights among them; by default every linear weight of the numbered blocks, experts aside: what a LoRA
                on all linear layers adapts.
            rank: vectors a module; 64 when neither this nor `energy` is given.
            energy: share of ‖V‖²_F to hold, instead of a rank.
            exclude: names or patterns ("lm_head", "layers.0.*") of modules to exclude.
            seed: of the random start.
            threads: number of threads; all cores by default. With a device, of those that read.
            device: where to compute: "cuda", "cuda:1", "xpu", or "cpu" for the same operations by torch; None: the CPU, by
                the extension.
            progress: told about every module; None shows a bar where standard error is a terminal, False nothing.

        Raises:
            CheckpointError: a checkpoint cannot be read, is quantised, or holds NaN or Inf.
            PairingError: a module has no counterpart of the same shape in the base, or V is zero everywhere.
            SettingsError: a setting is out of range, or nothing is computed on `device`.
            BackendError: this machine has no such device, or it has too little memory.
            MissingDependencyError: a device needs torch.
        """
        from safelora_fast.subspace.build import build_subspace

        with bar_on_a_terminal(progress) as told:
            return build_subspace(
                aligned,
                base,
                modules=modules,
                rank=rank,
                energy=energy,
                exclude=exclude,
                seed=seed,
                threads=threads,
                device=device,
                progress=told,
            )

    @classmethod
    def from_sources(cls, *, aligned: str | Path, base: str | Path) -> SafeSubspace:
        """Name the sources and take their fingerprints, but compute no U_k: all that SafeLora needs at the end.

        Raises:
            CheckpointError: a checkpoint cannot be read.
            PairingError: both are the same model.
        """
        from safelora_fast.checkpoints.provenance import describe, same_content
        from safelora_fast.checkpoints.sources import open_checkpoint

        models = {"aligned": aligned, "base": base}
        sources = {role: describe(open_checkpoint(source, role=role)) for role, source in models.items()}
        if same_content(sources["aligned"], sources["base"]):
            raise PairingError(
                f"{base}: aligned and base hold the same weights, so V = aligned - base is zero; give the model before "
                "alignment as base"
            )
        return cls({}, sources)

    def find(self, name: str, tower: str | None = None) -> ModuleSubspace:
        """The subspace of a module of a loaded model; wrappers before the name and spellings do not matter.

        Args:
            name: the module's name in the model.
            tower: the part of a larger model that the model is: :func:`safelora_fast.checkpoints.tensor_names.tower_of_class`.

        Raises:
            PairingError: there is none, or more than one; the message names the nearest.
        """
        found = [weight.removesuffix(".weight") for weight in self._index.find(f"{name}.weight", tower)]
        if len(found) == 1:
            return self.modules[found[0]]
        if not self.modules:
            raise PairingError(
                "this subspace names its sources only, which serves SafeLora at the end; SafeSubspace.build computes the "
                "vectors too"
            )
        ending = name.rsplit(".", 1)[-1]
        near = found or [known for known in self.modules if known.rsplit(".", 1)[-1] == ending]
        problem = "is ambiguous in the subspace" if found else "is not in the subspace"
        built = f", which was built for modules {self.settings['modules']}" if self.settings.get("modules") else ""
        raise PairingError(f"module {name} {problem}{built}; nearest: {', '.join(sorted(near)[:3]) or 'none'}")

    def to_dict(self) -> dict[str, Any]:
        """What is known of it apart from the vectors, for JSON; the energy is None where V is zero."""
        modules = [
            {
                "name": name,
                "rows": len(module.left_vectors),
                "columns": module.columns,
                "rank": module.rank,
                "energy": None if math.isnan(module.energy) else module.energy,
                "v_norm": module.v_norm,
                "spectral_norm": module.spectral_norm,
            }
            for name, module in self.modules.items()
        ]
        return {"settings": dict(self.settings), "sources": dict(self.sources), "modules": modules}

    @cached_property
    def _index(self) -> NameIndex:
        return NameIndex(f"{name}.weight" for name in self.modules)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, under a temporary name first.

        Raises:
            OutputError: the file cannot be written.
        """
        tensors: dict[str, np.ndarray] = {}
        facts: list[dict[str, Any]] = []
        for name, module in self.modules.items():
            tensors[name + _VECTORS] = np.ascontiguousarray(module.left_vectors, dtype=np.float32)
            tensors[name + _VALUES] = np.ascontiguousarray(module.singular_values, dtype=np.float32)
            facts.append({"name": name, "v_norm": module.v_norm, "columns": module.columns})
        # One entry only: safetensors writes several in no fixed order, and the same subspace must give the same bytes.
        document = {"version": VERSION, "modules": facts, "sources": self.sources, "settings": self.settings}
        metadata = {FORMAT: json.dumps(document, sort_keys=True, default=dict)}
        with whole_file(Path(path)) as partial:
            try:
                save_file(tensors, partial, metadata=metadata)
            except SafetensorError as error:
                raise OutputError(f"{path}: the subspace cannot be written ({error}); nothing was kept") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SafeSubspace:
        """Read a file that :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or no subspace.
        """
        try:
            check_regular(path)
            with safe_open(path, framework="numpy") as file:
                document = check_fields(parse_json((file.metadata() or {}).get(FORMAT, "{}")), {})
                if document.get("version") != VERSION:
                    raise CheckpointError(
                        f"{path}: not a subspace file of version {VERSION} (safelora-fast subspace build)"
                    )
                check_fields(document, {"modules": LIST, "sources": OBJECT, "settings": OBJECT})
                check_fields(document["settings"], {}, {"median_v_ratio": REAL})
                for role, source in document["sources"].items():
                    check_source(role, source)
                facts = [check_fields(one, _MODULE) for one in document["modules"]]
                modules = {one["name"]: _read(file, one) for one in facts}
                return cls(modules, document["sources"], document["settings"])
        except (OSError, SafetensorError, ValueError, TypeError) as error:  # TypeError: a dtype that numpy lacks
            raise CheckpointError(f"{path}: the subspace cannot be read ({error})") from error


def _read(file: Any, facts: Mapping[str, Any]) -> ModuleSubspace:
    name = facts["name"]
    vectors, values = file.get_tensor(name + _VECTORS), file.get_tensor(name + _VALUES)
    if vectors.dtype != np.float32 or vectors.ndim != 2 or values.shape != vectors.shape[1:]:
        raise ValueError(f"{name}: {vectors.dtype} vectors of shape {vectors.shape}, {values.shape} singular values")
    if not (np.isfinite(vectors).all() and np.isfinite(values).all()):
        raise ValueError(f"{name}: holds NaN or Inf: the file is damaged")
    return ModuleSubspace(vectors, values, float(facts["v_norm"]), int(facts["columns"]))
