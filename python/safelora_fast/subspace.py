"""The safe subspace of a pair of checkpoints: for each module the leading left singular vectors of aligned − base."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from safelora_fast.errors import CheckpointError, OutputError, PairingError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

FORMAT = "safelora_fast.subspace"
VERSION = 1
_VECTORS, _VALUES = ".left_vectors", ".singular_values"


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
        """Number of vectors k."""
        return int(self.left_vectors.shape[1])

    @property
    def energy(self) -> float:
        """Share of ‖V‖²_F that the subspace holds; NaN where V is zero."""
        if self.v_norm == 0:
            return float("nan")
        return float(np.square(self.singular_values.astype(np.float64)).sum() / self.v_norm**2)


@dataclass(frozen=True)
class SafeSubspace:
    """U_k, σ_k and ‖V‖_F of every module of a pair of checkpoints, with the sources that they came from.

    Attributes:
        modules: by module name, as in the checkpoints ("model.layers.0.self_attn.q_proj").
        sources: "aligned" and "base", each with what identifies it (path or Hub id, revision, hashes).
    """

    modules: Mapping[str, ModuleSubspace]
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        *,
        aligned: str | os.PathLike[str],
        base: str | os.PathLike[str],
        modules: Sequence[str] | None = None,
        rank: int | None = None,
        energy: float | None = None,
        fan_in_fan_out: bool = False,
        seed: int = 0,
        threads: int | None = None,
        progress: Callable[[str, ModuleSubspace], None] | None = None,
    ) -> SafeSubspace:
        """Build from two checkpoints on disk by randomised subspace iteration; they are streamed, no model is loaded.

        Args:
            aligned: the aligned (instruct) checkpoint: a safetensors file, or a folder with one or with an index.
            base: the base checkpoint, likewise.
            modules: last parts of module names; by default the seven projections of Llama-like models.
            rank: vectors a module (64 when neither this nor `energy` is given).
            energy: share of ‖V‖²_F to hold, instead of a rank.
            fan_in_fan_out: weights are stored (in, out), as Conv1D keeps them.
            seed: of the random start; the same seed gives the same subspace.
            threads: threads of the kernels.
            progress: called after each module.

        Raises:
            CheckpointError: a checkpoint cannot be read.
            PairingError: a module is in one checkpoint only, or has another shape there.
            SettingsError: a setting is out of range.
        """
        from safelora_fast.subspace_build import PROJECTIONS, build_subspace

        return build_subspace(
            aligned,
            base,
            modules=PROJECTIONS if modules is None else modules,
            rank=rank,
            energy=energy,
            fan_in_fan_out=fan_in_fan_out,
            seed=seed,
            threads=threads,
            progress=progress,
        )

    def find(self, name: str) -> ModuleSubspace:
        """The subspace of a module of a loaded model, whatever prefix either side puts before the name.

        Raises:
            PairingError: there is none, or more than one; the message names the nearest.
        """
        if name in self.modules:
            return self.modules[name]
        found = [known for known in self.modules if known.endswith("." + name) or name.endswith("." + known)]
        if len(found) == 1:
            return self.modules[found[0]]
        ending = name.rsplit(".", 1)[-1]
        near = found or [known for known in self.modules if known.rsplit(".", 1)[-1] == ending]
        problem = "is ambiguous in the subspace" if found else "is not in the subspace"
        raise PairingError(f"module {name} {problem}; nearest: {', '.join(sorted(near)[:3]) or 'none'}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, under a temporary name first.

        Raises:
            OutputError: the file cannot be written.
        """
        tensors: dict[str, np.ndarray] = {}
        facts: dict[str, dict[str, float | int]] = {}
        for name, module in sorted(self.modules.items()):
            tensors[name + _VECTORS] = np.ascontiguousarray(module.left_vectors, dtype=np.float32)
            tensors[name + _VALUES] = np.ascontiguousarray(module.singular_values, dtype=np.float32)
            facts[name] = {"v_norm": module.v_norm, "columns": module.columns}
        # One entry only: safetensors writes several in no fixed order, and the same subspace must give the same bytes.
        document = {"version": VERSION, "modules": facts, "sources": self.sources}
        metadata = {FORMAT: json.dumps(document, sort_keys=True, default=dict)}
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            save_file(tensors, temporary, metadata=metadata)
            temporary.replace(target)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{target}: the subspace cannot be written ({error})") from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SafeSubspace:
        """Read a file that :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or no subspace.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                document = json.loads((file.metadata() or {}).get(FORMAT, "{}"))
                if document.get("version") != VERSION:
                    raise CheckpointError(
                        f"{path}: not a subspace file of version {VERSION} (safelora-fast subspace build)"
                    )
                modules = {
                    name: ModuleSubspace(
                        left_vectors=file.get_tensor(name + _VECTORS),
                        singular_values=file.get_tensor(name + _VALUES),
                        v_norm=float(facts["v_norm"]),
                        columns=int(facts["columns"]),
                    )
                    for name, facts in document["modules"].items()
                }
                return cls(modules, document["sources"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: the subspace cannot be read ({error})") from error
