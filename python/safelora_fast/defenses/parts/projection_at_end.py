"""SafeLoRA at the end of training: projects the model's adapter in place, as `safelora-fast project` would."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.checkpoints.adapter import TRAINED_IN_FULL, WEIGHTS, load_adapters
from safelora_fast.checkpoints.provenance import locator, reopen
from safelora_fast.defenses.base import Attached
from safelora_fast.defenses.parts.optimizers import has_modes, parameters_of, weight_copies
from safelora_fast.errors import CheckpointError, PairingError, SafeLoraFastError, SettingsError, TrainingError
from safelora_fast.models.anatomy import gathered
from safelora_fast.models.distributed import broadcast_from_first, on_first_rank, sum_over_ranks
from safelora_fast.models.lora_factors import active_adapter, adapter_holder
from safelora_fast.models.shards import local_rows, matching_rows, write_rows
from safelora_fast.projection.copied_tensors import bypass_note
from safelora_fast.projection.peft_model import lora_parameters, naming_adapter, projected_folder, save_tensors
from safelora_fast.projection.plan import plan_projection

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from safelora_fast.defenses.base import Run
    from safelora_fast.projection.report import ProjectionReport
    from safelora_fast.projection.settings import Settings
    from safelora_fast.subspace.safe_subspace import SafeSubspace

ROLES = ("aligned", "base")
SAME_NORM = 1e-6
SAME_NORM_AS_ON_A_DEVICE = 2e-5  # a device adds squares in another precision and order
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Written:
    """A projected lora_A or lora_B, with digests of this process's shard before and after the projection."""

    parameter: torch.Tensor
    before: bytes
    after: bytes

    @property
    def changed(self) -> bool:
        return _digest(self.parameter) != self.after


def _digest(parameter: torch.Tensor) -> bytes:
    """Digest of this process's shard of a parameter; -0 and 0 count as equal."""
    rows = (local_rows(parameter).detach().cpu() + 0.0).contiguous()
    return hashlib.blake2b(rows.view(torch.uint8).numpy()).digest()


class ProjectionAtEnd(Attached):
    """Projects the active adapter of a model in place, with V streamed from the sources of the subspace.

    Process 0 reads the checkpoints and broadcasts the result, so all processes must call. The constructor checks as
    much as possible before training: sources that are gone or have changed, modules without a match in them, and
    adapter types that cannot be projected.

    Raises:
        SafeLoraFastError: a check failed; raised with the reason on every process.
    """

    def __init__(self, run: Run, subspace: SafeSubspace, settings: Settings) -> None:
        self._run = run
        self._subspace = subspace
        self._settings = asdict(settings)
        self._holder = adapter_holder(run.model, owner="SafeLora")
        self._adapter = active_adapter(run.model, owner="SafeLora")
        if any(getattr(module, "merged", False) for module in self._holder.modules()):
            raise SettingsError(
                "SafeLora: the adapter is merged into the model's weights: call unmerge_adapter() first"
            )
        tensors = self._gathered(lora_parameters(self._holder, self._adapter)[0])
        self._written: dict[str, _Written] = {}
        self._report: ProjectionReport | None = None
        on_first_rank(lambda: self._rehearse(tensors))

    def finish(self) -> ProjectionReport:
        """Project, write the result into the model, and return the report. Collective.

        A second call does nothing, unless all projected weights have been replaced since. The new weights are then
        projected too, with a warning.

        An optimizer with modes (schedule-free) is switched to evaluation mode first, because those weights are the ones
        to save. Copies of the weights in the optimizer state are overwritten so that they cannot come back.

        Raises:
            SafeLoraFastError: the sources have changed, or lora_A or lora_B holds NaN or Inf; the model is unchanged.
            TrainingError: some of the projected weights have changed, but not all.
        """
        if self._report is not None and not self._replaced():
            return self._report
        if self._report is not None:
            logger.warning(
                "SafeLora: other weights were put into the model after its projection: they are projected now"
            )
        optimizer = self._run.optimizer
        if has_modes(optimizer):
            optimizer.eval()
        parameters, others = lora_parameters(self._holder, self._adapter)
        tensors = self._gathered(parameters)
        before = {key: _digest(parameter) for key, parameter in parameters.items()}
        report = on_first_rank(lambda: self._project(tensors, others))
        wholes = {key: broadcast_from_first(tensors[key], parameter.device) for key, parameter in parameters.items()}
        _write(parameters, wholes)
        for parameter in parameters_of(optimizer):
            for copy in weight_copies(optimizer, parameter):
                with torch.no_grad():
                    copy.copy_(parameter)
        self._written = {
            key: _Written(parameter, before[key], _digest(parameter)) for key, parameter in parameters.items()
        }
        if has_modes(optimizer):
            optimizer.train()
            optimizer.eval()
            if self._changed():
                _write(parameters, wholes)
                logger.warning(
                    "SafeLora: train() and eval() of %s rewrite the projected weights: they are written again; save the "
                    "adapter before the optimizer is told of either",
                    type(optimizer).__name__,
                )
        self._report = report
        (adapter,) = report.adapters
        cosines = [module.cosine for module in adapter.modules if not math.isnan(module.cosine)]
        self._run.metrics["cosine_min"] = min(cosines, default=math.nan)
        self._run.metrics["modules_projected"] = float(len(adapter.projected))
        return report

    def check_finished(self) -> None:
        """Raise TrainingError if weights have changed since the projection.

        Raises:
            TrainingError: names the first changed tensor.
        """
        changed = self._changed()
        if changed:
            more = f" and {len(changed) - 1} other factors have" if len(changed) > 1 else " has"
            raise TrainingError(
                f"SafeLora: {changed[0]}{more} changed since the projection (a callback, or an optimizer that keeps weights "
                "of its own): save the adapter with model.save_pretrained() and project it with `safelora-fast project`"
            )

    def _changed(self) -> list[str]:
        """Keys of the tensors that have changed since the projection, on this process."""
        return [key for key, written in self._written.items() if written.changed]

    def _replaced(self) -> bool:
        """Whether all tensors that the projection changed have been replaced since. Collective.

        Raises:
            TrainingError: only some were replaced, so a second projection would project the others twice.
        """
        changed = set(self._changed())
        kept = [key for key, one in self._written.items() if one.before != one.after and key not in changed]
        device = next(iter(self._written.values())).parameter.device
        replaced, left = sum_over_ranks([float(len(changed)), float(len(kept))], device)
        if replaced and left:
            self.check_finished()
        return bool(replaced)

    def _gathered(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: gathered(parameter).detach().cpu().clone() for key, parameter in parameters.items()}

    def _rehearse(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Run all steps of the projection that do not read weights, to find errors before training."""
        with tempfile.TemporaryDirectory(prefix="safelora-fast-") as folder, self._described(Path(folder)):
            models = [reopen(self._subspace.sources.get(role, {}), role=role) for role in ROLES]
            plan_projection(load_adapters([self._save(tensors, Path(folder))], self._settings["exclude"]), *models)

    def _project(self, tensors: dict[str, torch.Tensor], others: list[str]) -> ProjectionReport:
        """Replace `tensors` by their projections, and log the warnings of the report."""
        from safetensors.torch import load_file

        sources = self._subspace.sources
        with tempfile.TemporaryDirectory(prefix="safelora-fast-") as folder, self._described(Path(folder)):
            for role in ROLES:
                reopen(sources[role], role=role)
            where: dict[str, Any] = {role: locator(sources[role]) for role in ROLES}
            saved = self._save(tensors, Path(folder, "saved"))
            with projected_folder(saved, self._adapter, **where, **self._settings) as (report, projected):
                self._check_norms(report)
                tensors.update(load_file(projected / WEIGHTS))
        copied = [{"tensor": key, "reason": TRAINED_IN_FULL} for key in others]
        (one,) = report.adapters
        one = replace(one, copied=[*one.copied, *copied], notes=[*one.notes, *bypass_note(copied)])
        report = replace(report, adapters=[one])
        for warning in report.warnings:
            logger.warning("SafeLora: %s", warning)
        return report

    def _save(self, tensors: Mapping[str, torch.Tensor], folder: Path) -> Path:
        return save_tensors(tensors, self._holder.peft_config[self._adapter], folder)

    def _check_norms(self, report: ProjectionReport) -> None:
        """Compare ‖V‖_F with its value when the subspace was built: a change to any weight changes it."""
        tolerance = SAME_NORM_AS_ON_A_DEVICE if self._subspace.settings.get("device") else SAME_NORM
        for module in report.adapters[0].modules:
            with contextlib.suppress(PairingError):
                then = self._subspace.find(module.name).v_norm
                if not math.isclose(then, module.v_norm, rel_tol=tolerance):
                    raise CheckpointError(
                        f"{module.name}: ‖V‖ is {module.v_norm:.8g}, but was {then:.8g} when the subspace was built: a "
                        "checkpoint has changed"
                    )

    @contextlib.contextmanager
    def _described(self, folder: Path) -> Iterator[None]:
        """Make error messages name SafeLora and the model's adapter instead of the temporary folder."""
        try:
            with naming_adapter(folder, self._adapter), naming_adapter(folder / "saved", self._adapter):
                yield
        except SafeLoraFastError as error:
            raise type(error)(f"SafeLora: {error}") from error


def _write(parameters: Mapping[str, torch.Tensor], wholes: Mapping[str, torch.Tensor]) -> None:
    for key, parameter in parameters.items():
        write_rows(parameter, matching_rows(parameter, wholes[key], owner="SafeLora"))
