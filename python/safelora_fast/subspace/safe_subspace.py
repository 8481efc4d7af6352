"""The safe subspace of a pair of checkpoints: for each module, the leading left singular vectors of aligned − base."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safelora_fast import _core
from safelora_fast.checkpoints.provenance import check_source, describe, same_content
from safelora_fast.checkpoints.sources import open_checkpoint
from safelora_fast.checkpoints.tensor_names import NameIndex
from safelora_fast.errors import PairingError, SettingsError
from safelora_fast.files.argument_checks import patterns, whole_number
from safelora_fast.files.json_reader import COUNT, LIST, NUMBER, OBJECT, REAL, TEXT, Kind, check_fields
from safelora_fast.files.progress import bar_on_a_terminal
from safelora_fast.files.tensor_file import TensorFile
from safelora_fast.subspace.module_subspace import ModuleSubspace

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from safelora_fast.projection.module_reports import Progress
    from safelora_fast.subspace.subspace_pair import SubspacePair

FILE = TensorFile("safelora_fast.subspace", 1, "subspace", "safelora-fast subspace build")
RANK = 64
VECTORS, VALUES = ".left_vectors", ".singular_values"
NORM = Kind("a finite number from 0", lambda value: NUMBER.fits(value) and value >= 0)
MODULE = {"name": TEXT, "v_norm": NORM, "columns": COUNT}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SafeSubspace:
    """U_k, σ_k and ‖V‖_F of every module of a pair of checkpoints, with the sources that they came from.

    Attributes:
        modules: by module name, as in the aligned checkpoint ("model.layers.0.self_attn.q_proj").
        sources: "aligned" and "base", each as returned by :func:`~safelora_fast.checkpoints.provenance.describe`.
        settings: how it was built: rank or energy, seed, modules, and the version of this package. For a device, also
            the kind of device ("cuda") and the version of torch.
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
        """Build from two checkpoints by a randomized block Krylov iteration (Halko et al. 2011, arXiv 0909.4061).

        The checkpoints are streamed once, and no model is loaded. Weights are paired by name as in a projection, so the
        two checkpoints may be sharded, fused, spelled and typed differently. The same input and seed give the same
        bytes for any number of threads.

        With a `device`, torch runs the same iteration there, one module at a time, while the next 512 MiB of weights
        are read. The device holds such a batch (or both weights of a larger module), the basis and its products.
        Singular values agree with those of the CPU to about 1e-5 of σ₁, and U_k·U_kᵀ to about 1e-5·σ₁/(σ_k − σ_k+1).
        Bytes depend on the device and on the version of torch. The speed of the two paths has not been compared.

        Args:
            aligned: the aligned (instruct) model: a path, or a Hub id with an optional `@revision`.
            base: the model before alignment, in the same form.
            modules: last components of module names ("q_proj", "mlp.down_proj"), also of experts, embeddings and parts
                of fused weights. None selects every linear weight of the numbered layers, except experts. These are the
                modules that a LoRA on all linear layers adapts.
            rank: vectors per module; 64 if neither this nor `energy` is given.
            energy: share of ‖V‖²_F to keep, instead of a rank.
            exclude: names or patterns ("lm_head", "layers.0.*") of modules to exclude.
            seed: seed of the random start.
            threads: number of threads (with a device: of reader threads); all cores by default.
            device: where torch computes: "cuda", "cuda:1", "xpu" or "cpu". None: the CPU, without torch.
            progress: receives progress after every module. None shows a bar if standard error is a terminal; False
                shows nothing.

        Raises:
            CheckpointError: a checkpoint cannot be read, is quantized, or holds NaN or Inf.
            PairingError: a module has no counterpart of the same shape in the base, or V is zero everywhere.
            SettingsError: a setting is out of range, or torch cannot compute on `device`.
            BackendError: the device does not exist, or it has too little memory.
            MissingDependencyError: a device was given, but torch is not installed.
        """
        from safelora_fast.checkpoints.weight_norms import median_ratio, weight_norm
        from safelora_fast.projection.settings import Settings
        from safelora_fast.subspace.plan import checked_device, plan_subspace, start

        if rank is None and energy is None:
            rank = RANK
        left_out = patterns("exclude", exclude)
        settings = Settings("orthogonal", rank=rank, energy=energy, select="all", threads=threads)
        if not 0 <= whole_number("seed", seed) < 2**64:
            raise SettingsError(f"seed must be a whole number from 0 to 2**64 - 1, not {seed}")
        if modules is not None and (isinstance(modules, str) or not all(modules) or not modules):
            raise SettingsError(f'modules must be names like ["q_proj", "v_proj"], not {modules!r}')
        on = checked_device(device)
        models = {"aligned": open_checkpoint(aligned, role="aligned"), "base": open_checkpoint(base, role="base")}
        plan = plan_subspace(models["aligned"], models["base"], modules, left_out)
        for warning in (line for model in models.values() for line in model.warnings):
            logger.warning(warning)
        sources = {role: describe(model) for role, model in models.items()}
        built: dict[str, ModuleSubspace] = {}
        ratios: list[float] = []
        stream = start(plan, settings, seed, on)
        try:
            with bar_on_a_terminal(progress) as told:
                if told is not None:
                    told.start(plan.nbytes, len(plan.modules))
                for outcome in stream:
                    planned = plan.modules[outcome.index]
                    ratios.append(outcome.v_norm / (weight_norm(planned.group.aligned) or math.nan))
                    rows, columns = planned.shape
                    vectors = np.frombuffer(outcome.left_vectors(), dtype="<f4").reshape(-1, rows)
                    values = np.array(outcome.singular_values(), dtype=np.float32)
                    built[planned.name] = ModuleSubspace(
                        np.ascontiguousarray(vectors.T), values, outcome.v_norm, columns
                    )
                    if told is not None:
                        told.advance(stream.bytes_done, planned.name)
        finally:
            stream.close()
        if all(module.v_norm == 0 for module in built.values()):
            raise PairingError(
                "aligned and base hold the same weights in every module, so V = aligned - base is zero and there is no "
                "subspace; give the model before alignment as --base"
            )
        described = {
            "rank": rank,
            "energy": energy,
            "seed": seed,
            "median_v_ratio": float(f"{median_ratio(ratios):.4g}"),
            "exclude": list(left_out) or None,
            "modules": None if modules is None else list(modules),
            "safelora-fast": _core.__version__,
        }
        if on is not None:
            import torch

            described |= {"device": on.type, "torch": torch.__version__}
        return cls(built, sources, described)

    @classmethod
    def from_sources(cls, *, aligned: str | Path, base: str | Path) -> SafeSubspace:
        """Return the sources and their fingerprints without U_k. SafeLora needs no more at the end of training.

        Raises:
            CheckpointError: a checkpoint cannot be read.
            PairingError: both checkpoints hold the same weights.
        """
        models = {"aligned": aligned, "base": base}
        sources = {role: describe(open_checkpoint(source, role=role)) for role, source in models.items()}
        if same_content(sources["aligned"], sources["base"]):
            raise PairingError(
                f"{base}: aligned and base hold the same weights, so V = aligned - base is zero; give the model before "
                "alignment as base"
            )
        return cls({}, sources)

    def find(self, name: str, tower: str | None = None) -> ModuleSubspace:
        """Return the subspace of a module of a loaded model. Leading wrappers and spelling of the name do not matter.

        Args:
            name: the module's name in the model.
            tower: the tower of a larger model that this model is
                (:func:`~safelora_fast.checkpoints.tensor_names.tower_of_class`).

        Raises:
            PairingError: no module matches, or several do; the message names the nearest.
        """
        return self.modules[self.find_name(name, tower)]

    def find_name(self, name: str, tower: str | None = None) -> str:
        """Return the name in the subspace of a module of a loaded model; see :meth:`find`."""
        found = [weight.removesuffix(".weight") for weight in self._index.find(f"{name}.weight", tower)]
        if len(found) == 1:
            return found[0]
        if not self.modules:
            raise PairingError(
                "this subspace only names its sources, which is enough for SafeLora at the end; SafeSubspace.build computes the "
                "vectors too"
            )
        ending = name.rsplit(".", 1)[-1]
        near = found or [known for known in self.modules if known.rsplit(".", 1)[-1] == ending]
        problem = "is ambiguous in the subspace" if found else "is not in the subspace"
        built = f", which was built for modules {self.settings['modules']}" if self.settings.get("modules") else ""
        raise PairingError(f"module {name} {problem}{built}; nearest: {', '.join(sorted(near)[:3]) or 'none'}")

    def as_pair(self) -> SubspacePair:
        """Return the pair of models for :func:`~safelora_fast.project_adapter`, which needs no checkpoints then.

        Raises:
            PairingError: the subspace has no vectors.
        """
        from safelora_fast.subspace.subspace_pair import SubspacePair

        if not self.modules:
            raise PairingError("this subspace only names its sources; SafeSubspace.build computes the vectors too")
        return SubspacePair(self.modules, self.sources, self.find_name)

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the vectors, for JSON; the energy is None if V is zero."""
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
        """Write one safetensors file atomically.

        Raises:
            OutputError: the file cannot be written.
        """
        tensors: dict[str, np.ndarray] = {}
        facts = []
        for name, module in self.modules.items():
            tensors |= {name + VECTORS: module.left_vectors, name + VALUES: module.singular_values}
            facts.append({"name": name, "v_norm": module.v_norm, "columns": module.columns})
        FILE.save(path, tensors, {"modules": facts, "sources": self.sources, "settings": self.settings})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SafeSubspace:
        """Read a file that :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or not a subspace.
        """
        with FILE.opened(path) as (document, file):
            check_fields(document, {"modules": LIST, "sources": OBJECT, "settings": OBJECT})
            check_fields(document["settings"], {}, {"median_v_ratio": REAL})
            for role, source in document["sources"].items():
                check_source(role, source)
            facts = [check_fields(one, MODULE) for one in document["modules"]]
            modules = {one["name"]: _read(file, one) for one in facts}
            return cls(modules, document["sources"], document["settings"])


def _read(file: Any, facts: Mapping[str, Any]) -> ModuleSubspace:
    name = facts["name"]
    vectors, values = file.get_tensor(name + VECTORS), file.get_tensor(name + VALUES)
    if vectors.dtype != np.float32 or vectors.ndim != 2 or values.shape != vectors.shape[1:]:
        raise ValueError(f"{name}: {vectors.dtype} vectors of shape {vectors.shape}, {values.shape} singular values")
    if not (np.isfinite(vectors).all() and np.isfinite(values).all()):
        raise ValueError(f"{name}: holds NaN or Inf: the file is damaged")
    return ModuleSubspace(vectors, values, float(facts["v_norm"]), int(facts["columns"]))
