"""SafeLoRA after optimizer steps: projects lora_B onto the safe subspace in place."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.defenses.base import Attached
from safelora_fast.defenses.parts.optimizers import has_modes, weight_copies
from safelora_fast.errors import SettingsError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from safelora_fast.defenses.base import Run
    from safelora_fast.defenses.parts.safe_modules import SafeModules

MOST_OUTSIDE = 8.0  # in units of the rounding of B's dtype; rounding P_k·B to that dtype leaves less than 1
STANDS_STILL = 1e-6  # relative rounding error of switching an optimizer to evaluation mode and back
logger = logging.getLogger(__name__)


class ProjectionAtSteps(Attached):
    """B ← U_k·U_kᵀ·B after every `every`-th optimizer step.

    Args:
        run: the training run.
        modules: modules to project.
        every: interval in optimizer steps, counted from the start of training, also after a resume.
    """

    def __init__(self, run: Run, modules: SafeModules, every: int) -> None:
        self._run, self._modules, self._every = run, modules, every
        self._watched: tuple[int, torch.Tensor] | None = None
        self._projected_at: int | None = None
        self._begun = self._modes_tried = False

    def factors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Return (module, lora_B) of every module."""
        return self._modules.factors()

    def start(self) -> None:
        """Record the norms of the weights.

        Raises:
            SettingsError: no optimizer was given.
        """
        if self._run.optimizer is None:
            raise SettingsError('SafeLora: at="step" needs the optimizer whose steps it follows: optimizer=')
        self._watch(begun=False)

    def before_loss(self) -> None:
        """Check that weights change only in optimizer steps that the hooks report.

        Raises:
            TrainingError: weights have changed without such a step, so nothing would ever be projected.
        """
        self._watch(begun=True)

    def _watch(self, *, begun: bool) -> None:
        seen, norms = self._run.steps_seen, self._modules.norms()
        if self._watched is None or self._watched[0] != seen or begun != self._begun:
            self._watched, self._begun = (seen, norms), begun
        elif not torch.allclose(norms, self._watched[1], rtol=STANDS_STILL, atol=0.0, equal_nan=True):
            if self._run.stepping:
                raise TrainingError(
                    f"SafeLora: {type(self._run.optimizer).__name__} asks for the loss several times in one step and changes "
                    'lora_B in between, and at="step" projects after the step only: use another optimizer, or at="end"'
                )
            raise TrainingError(
                'SafeLora: lora_B has changed, but no step of the optimizer was seen, so at="step" projects nothing: an '
                "optimizer without step hooks (DeepSpeed, LOMO) needs defended.engine_stepped() after each step; or use "
                'at="end"'
            )

    def after_step(self) -> None:
        """Project, after every `every`-th step.

        Raises:
            TrainingError: a lora_B is not finite, or the optimizer would restore the weights that were projected away.
        """
        if self._run.steps % self._every == 0:
            self._project()
            self._try_modes()

    def finish(self) -> None:
        """Check that the weights projected last are still in the model; project any weights that replaced them.

        Raises:
            TrainingError: weights have changed, but the hooks reported no optimizer step.
        """
        if not self._run.steps_seen:
            self._watch(begun=self._begun)
        if self._projected_at == self._run.steps_seen and self._modules.outside() > MOST_OUTSIDE:
            logger.warning(
                "SafeLora: after the last step other weights were put into the model, outside of the safe subspace (averages, "
                "or slow weights): they are projected now"
            )
            self._project()

    def _project(self) -> None:
        run, modules = self._run, self._modules
        cosine = modules.project(run.steps, lambda parameter: weight_copies(run.optimizer, parameter))
        run.metrics["cosine_min"] = cosine
        run.metrics["modules_projected"] = float(len({module.name for module in modules.modules}))
        self._projected_at = run.steps_seen

    def _try_modes(self) -> None:
        """Check once that the optimizer's evaluation weights, if it has separate ones, are in the subspace too."""
        optimizer: Any = self._run.optimizer
        if self._modes_tried or not has_modes(optimizer):
            return
        self._modes_tried, modules = True, self._modules
        if any(True for module in modules.modules for _ in weight_copies(optimizer, module.lora_b)):
            return  # known copies, which are projected too
        optimizer.eval()
        outside = modules.outside()
        optimizer.train()
        if outside > MOST_OUTSIDE:
            raise TrainingError(
                f"SafeLora: eval() of {type(optimizer).__name__} puts weights into the model that are not projected: use "
                'another optimizer, or at="end"'
            )
