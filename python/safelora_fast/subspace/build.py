"""Building a safe subspace: both checkpoints are streamed once, and what `orthogonal` projects onto is kept.

The extension does the work, or torch on a device.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from safelora_fast import _core
from safelora_fast.checkpoints.provenance import describe
from safelora_fast.checkpoints.sources import open_checkpoint
from safelora_fast.checkpoints.weight_norms import median_ratio, weight_norm
from safelora_fast.errors import MissingDependencyError, PairingError, SettingsError, how_to_install
from safelora_fast.files.argument_checks import patterns, whole_number
from safelora_fast.projection.jobs import start_stream
from safelora_fast.projection.settings import Settings
from safelora_fast.subspace.plan import plan_subspace
from safelora_fast.subspace.safe_subspace import ModuleSubspace, SafeSubspace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from safelora_fast.projection.device.subspace_stream import SubspaceStream
    from safelora_fast.projection.jobs import Plan
    from safelora_fast.projection.project import Progress

RANK = 64
logger = logging.getLogger(__name__)


def build_subspace(
    aligned: str | Path,
    base: str | Path,
    *,
    modules: Sequence[str] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    exclude: str | Sequence[str] | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> SafeSubspace:
    """Stream two checkpoints and keep U_k, σ_k and ‖V‖_F of each module; see :meth:`SafeSubspace.build`."""
    if rank is None and energy is None:
        rank = RANK
    left = patterns("exclude", exclude)
    settings = Settings("orthogonal", rank=rank, energy=energy, select="all", threads=threads)
    if not 0 <= whole_number("seed", seed) < 2**64:
        raise SettingsError(f"seed must be a whole number from 0 to 2**64 - 1, not {seed}")
    if modules is not None and (isinstance(modules, str) or not all(modules) or not modules):
        raise SettingsError(f'modules must be names like ["q_proj", "v_proj"], not {modules!r}')
    on = None if device is None else _torch_device(device)
    models = open_checkpoint(aligned, role="aligned"), open_checkpoint(base, role="base")
    plan = plan_subspace(*models, modules, left)
    for warning in (line for model in models for line in model.warnings):
        logger.warning(warning)
    sources = dict(zip(("aligned", "base"), map(describe, models), strict=True))
    stream = _start(plan, settings, seed, on)
    if progress is not None:
        progress.start(plan.nbytes, len(plan.modules))
    built: dict[str, ModuleSubspace] = {}
    ratios: list[float] = []
    try:
        for outcome in stream:
            planned = plan.modules[outcome.index]
            ratios.append(outcome.v_norm / (weight_norm(planned.group.aligned) or math.nan))
            rows, columns = planned.shape
            vectors = np.frombuffer(outcome.left_vectors(), dtype="<f4").reshape(-1, rows)
            built[planned.name] = ModuleSubspace(
                left_vectors=np.ascontiguousarray(vectors.T),
                singular_values=np.array(outcome.singular_values(), dtype=np.float32),
                v_norm=outcome.v_norm,
                columns=columns,
            )
            if progress is not None:
                progress.advance(stream.bytes_done, planned.name)
    finally:
        stream.close()
    if all(module.v_norm == 0 for module in built.values()):
        raise PairingError(
            "aligned and base hold the same weights in every module, so V = aligned - base is zero and there is no "
            "subspace; give the model before alignment as --base"
        )
    described: dict[str, Any] = {"rank": rank, "energy": energy, "seed": seed}
    described["median_v_ratio"] = float(f"{median_ratio(ratios):.4g}")
    described["exclude"] = list(left) or None
    described["modules"] = None if modules is None else list(modules)
    return SafeSubspace(built, sources, {**described, **_made_by(on)})


def _torch_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        SettingsError, BackendError: there is none.
        MissingDependencyError: torch is not installed.
    """
    try:
        from safelora_fast.projection.device.stream import torch_device
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError(f"device {name!r} needs torch: {how_to_install('train')}") from error
    return torch_device(name)


def _start(
    plan: Plan, settings: Settings, seed: int, device: torch.device | None
) -> _core.ProjectionStream | SubspaceStream:
    """Start the work; the stream must be closed."""
    if device is None:
        return start_stream(plan, settings, keep_subspace=True, seed=seed)
    from safelora_fast.projection.device.subspace_stream import SubspaceStream

    return SubspaceStream(plan, settings, device=device, seed=seed)


def _made_by(device: torch.device | None) -> dict[str, str]:
    """What did the work, for the settings of the file."""
    package = {"safelora-fast": _core.__version__}
    if device is None:
        return package
    import torch

    return {"device": device.type, **package, "torch": torch.__version__}
