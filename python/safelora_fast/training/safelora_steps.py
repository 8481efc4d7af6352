"""SafeLoRA's projections of a model in training: after optimizer steps, and once at the end."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.defenses.parts.safe_modules import SafeModules
from safelora_fast.errors import SettingsError, TrainingError
from safelora_fast.training.end_projection import EndProjection
from safelora_fast.training.optimizers import has_modes, weight_copies

if TYPE_CHECKING:
    from torch import nn

    from safelora_fast.defenses.safelora import SafeLora
    from safelora_fast.models.anatomy import Anatomy
    from safelora_fast.projection.report import ProjectionReport
    from safelora_fast.training.metrics import Meter, Stopwatch
    from safelora_fast.training.optimizer_steps import Steps

MOST_OUTSIDE = 8.0  # roundings of B's dtype: writing P_k·B leaves less than one
STANDS_STILL = 1e-6  # relative: what switching an optimizer to evaluation and back may round away
logger = logging.getLogger(__name__)


class Projections:
    """Projects the adapter when SafeLora says so.

    Args:
        steps: the optimizer's steps.
        meter: told what each projection changed.
        stopwatch: counts the projections after a step.

    Attributes:
        report: of the projection at the end; None before, and where there is none.
    """

    def __init__(self, steps: Steps, meter: Meter, stopwatch: Stopwatch) -> None:
        self._steps, self._meter, self._stopwatch = steps, meter, stopwatch
        self._at_step: tuple[SafeLora, SafeModules] | None = None
        self._end: EndProjection | None = None
        self._watched: tuple[int, torch.Tensor] | None = None
        self._projected_at: int | None = None
        self._begun = self._modes_tried = False
        self.report: ProjectionReport | None = None

    def add(self, defense: SafeLora, model: nn.Module, anatomy: Anatomy) -> None:
        """Do what a defense asks for.

        Raises:
            SafeLoraFastError: the model's adapter cannot be projected, or the sources of V are gone.
        """
        if defense.at == "end":
            self._end = EndProjection(model, defense)
        else:
            self._at_step = (
                defense,
                SafeModules(anatomy.model, defense.subspace, owner="SafeLora", exclude=defense.exclude),
            )

    def acting(self) -> list[tuple[str, SafeModules]]:
        """What is projected after steps, with whose it is.

        Raises:
            SettingsError: there is no optimizer to follow, and something is to be projected.
        """
        if self._at_step is None:
            return []
        if not self._steps.known:
            raise SettingsError('SafeLora: at="step" needs the optimizer whose steps it follows: optimizer=')
        return [("SafeLora", self._at_step[1])]

    def watch(self, *, begun: bool = True) -> None:
        """Look whether weights have moved although no step was heard of; called at each micro-batch, and at both ends.

        Args:
            begun: whether training has begun; until then weights may still be loaded.

        Raises:
            TrainingError: they have, so that nothing would ever be projected.
        """
        if self._at_step is None:
            return
        heard, norms = self._steps.heard, self._at_step[1].norms()
        if self._watched is None or self._watched[0] != heard or begun != self._begun:
            self._watched, self._begun = (heard, norms), begun
        elif not torch.allclose(norms, self._watched[1], rtol=STANDS_STILL, atol=0.0, equal_nan=True):
            raise TrainingError(
                'SafeLora: lora_B has changed, but no step of the optimizer was seen, so at="step" projects nothing: an '
                "optimizer without step hooks (DeepSpeed, LOMO) needs defended.engine_stepped() after each step; or use "
                'at="end"'
            )

    def after(self, step: int) -> None:
        """Project, where that is due after the step of this number.

        Raises:
            TrainingError: a factor is not finite, or the optimizer would bring back what was projected away.
        """
        if self._at_step is None or step % self._at_step[0].every:
            return
        with self._stopwatch.running():
            self._project(step)
            self._try_modes()

    def _project(self, step: int) -> None:
        assert self._at_step is not None  # noqa: S101
        modules, optimizer = self._at_step[1], self._steps.optimizer
        self._meter.set("cosine_min", modules.project(step, lambda parameter: weight_copies(optimizer, parameter)))
        self._projected_at = self._steps.heard
        self._meter.set("modules_projected", float(len({module.name for module in modules.modules})))

    def _try_modes(self) -> None:
        """Once, see that the weights for evaluation lie in the subspace too, where the optimizer has weights of its own."""
        optimizer: Any = self._steps.optimizer
        if self._modes_tried or not has_modes(optimizer):
            return
        assert self._at_step is not None  # noqa: S101
        self._modes_tried, modules = True, self._at_step[1]
        if any(True for module in modules.modules for _ in weight_copies(optimizer, module.left)):
            return  # known, and projected
        optimizer.eval()
        outside = modules.outside()
        optimizer.train()
        if outside > MOST_OUTSIDE:
            raise TrainingError(
                f"SafeLora: eval() of {type(optimizer).__name__} puts weights into the model that are not projected: use "
                'another optimizer, or at="end"'
            )

    def finish(self) -> ProjectionReport | None:
        """Project at the end, if that is asked for, and see that what was projected is in the model. Collective.

        A second call does nothing, unless other weights have been put into the model: they are projected, with a warning.

        Raises:
            TrainingError: no step of the optimizer was seen, or a part of what was projected has changed.
            SafeLoraFastError: the sources of V have changed, or a factor is NaN or infinite; the model is as it was.
        """
        if self._at_step is not None:
            self._finish_steps(self._at_step[1])
        if self._end is None:
            return None
        if self.report is not None and not self._end.replaced():
            return self.report
        if self.report is not None:
            logger.warning(
                "SafeLora: other weights were put into the model after its projection: they are projected now"
            )
        self.report = self._end.run(self._steps.optimizer)
        (adapter,) = self.report.adapters
        cosines = [module.cosine for module in adapter.modules if not math.isnan(module.cosine)]
        self._meter.set("cosine_min", min(cosines, default=math.nan))
        self._meter.set("modules_projected", float(len(adapter.projected)))
        return self.report

    def _finish_steps(self, modules: SafeModules) -> None:
        if not self._steps.heard:
            self.watch(begun=self._begun)
        if self._projected_at == self._steps.heard and modules.outside() > MOST_OUTSIDE:
            logger.warning(
                "SafeLora: after the last step other weights were put into the model, outside of the safe subspace (averages, "
                "or slow weights): they are projected now"
            )
            self._project(self._steps.made)

    def check(self) -> None:
        """Refuse weights that are not what the projection at the end wrote; does nothing before it.

        Raises:
            TrainingError: with the first factor.
        """
        if self._end is not None and self.report is not None:
            self._end.check()
