"""Counts the optimizer's steps with hooks, and skips a step when a defense is not finite."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from safelora_fast.defenses.parts.optimizers import parameters_of, with_hooks
from safelora_fast.errors import SettingsError, TrainingError
from safelora_fast.models.distributed import sum_over_ranks
from safelora_fast.models.shards import local_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch
    from torch.utils.hooks import RemovableHandle

    from safelora_fast.defenses.base import Run

OnNonFinite = Literal["raise", "skip"]
MOST_SKIPPED = 20  # steps in a row
logger = logging.getLogger(__name__)


class Steps:
    """Counts the optimizer steps of a run with step hooks.

    Args:
        run: the training run. If its optimizer is None, nothing is counted.
        on_nonfinite: "raise" the error of a defense that is not finite, or "skip" the step.
        afterwards: called after each step with True if it was made, False if it was skipped.

    Attributes:
        skipped: number of skipped steps.

    Raises:
        SettingsError: `on_nonfinite` is unknown.
    """

    def __init__(self, run: Run, *, on_nonfinite: OnNonFinite, afterwards: Callable[[bool], None]) -> None:
        if on_nonfinite not in {"raise", "skip"}:
            raise SettingsError(f'on_nonfinite is {on_nonfinite!r}, it must be "raise" or "skip"')
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._reason = "a defense is not finite on another process"
        self._run = run
        self._hooked = with_hooks(run.optimizer)
        self._on_nonfinite = on_nonfinite
        self._afterwards = afterwards
        self._skip = False
        self._micro_batches = 0  # of the window so far
        self._losses = 0
        self._losses_at_step: dict[int, int] = {}
        self._needing_loss = ""

    @property
    def coming(self) -> str:
        """The number of the next step, phrased for error messages; empty if steps are not counted."""
        return f" at optimizer step {self._run.steps + 1}" if self._run.optimizer is not None else ""

    def check(self, changed: Mapping[str, Iterable[tuple[str, torch.Tensor]]]) -> None:
        """Check that the optimizer trains the parameters that the defenses change.

        Args:
            changed: for each defense, the (module, lora_B) pairs that it changes.

        Raises:
            SettingsError: a trainable lora_B is not among the optimizer's parameters; or `on_nonfinite` is "skip" and
                the optimizer has no step hooks.
        """
        if self._on_nonfinite == "skip" and self._hooked is None:
            raise SettingsError(
                'on_nonfinite="skip" needs the optimizer whose step it skips, and hooks before its steps, which '
                "DeepSpeed's and LOMO lack"
            )
        known = {id(parameter) for parameter in parameters_of(self._run.optimizer)}
        for defense, factors in changed.items() if self._hooked is not None else ():
            for module, parameter in factors:
                if parameter.requires_grad and id(parameter) not in known:
                    raise SettingsError(
                        f"{defense}: lora_B of {module} is not among the optimizer's parameters: shard the model "
                        "(fully_shard) and make the optimizer before defend(); layer-wise optimizers, which step in "
                        "backward, are not supported"
                    )

    def attach(self, parameters: Iterable[torch.Tensor], *, needing_loss: Sequence[str]) -> list[RemovableHandle]:
        """Install the hooks, if the optimizer supports them. Return their handles.

        Args:
            parameters: parameters of the model. A warning is logged if any optimizer steps them without a defended loss.
            needing_loss: names of the defenses that such a step would skip, for that warning; empty disables it.
        """
        self._needing_loss = " and ".join(needing_loss)
        handles: list[RemovableHandle] = []
        if needing_loss:
            from torch.optim.optimizer import register_optimizer_step_post_hook

            ours = {id(parameter) for parameter in parameters}

            def any_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
                if any(id(parameter) in ours for parameter in parameters_of(optimizer)):
                    self._warn_if_unasked(optimizer)

            handles.append(register_optimizer_step_post_hook(any_step))
        if self._hooked is not None:
            handles.append(self._hooked.register_step_pre_hook(self._before))
            handles.append(self._hooked.register_step_post_hook(lambda *_: self._count()))
        return handles

    def not_finite(self, error: TrainingError) -> None:
        """Raise the error of a defense that is not finite, or make every process skip the next step."""
        if self._on_nonfinite == "raise":
            raise error
        self._skip, self._reason = True, str(error)

    def micro_batch(self, window: int) -> None:
        """Count a micro-batch of a window of `window` micro-batches. A new window clears the mark to skip a step.

        This is needed because a gradient scaler that finds Inf skips a step without running the hooks. If the caller
        passes no totals, a window lasts as long as gradients accumulate.
        """
        self._losses += 1
        if self._micro_batches >= window and not (self._skip and self._has_gradients()):
            if self._skip:
                self._afterwards(False)
            self._micro_batches, self._skip = 0, False
        self._micro_batches += 1

    def engine_stepped(self) -> None:
        """Count a step of an optimizer without hooks; does nothing if hooks count the steps."""
        if self._hooked is None:
            self._warn_if_unasked(self._run.optimizer)
            self._count()

    def _has_gradients(self) -> bool:
        """Whether any gradient on this process is nonzero."""
        gradients = [parameter.grad for parameter in parameters_of(self._run.optimizer) if parameter.grad is not None]
        return any(bool(local_rows(gradient).any()) for gradient in gradients)

    def _before(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        self._run.stepping = True
        if self._on_nonfinite != "skip":
            return
        device = optimizer.param_groups[0]["params"][0].device
        if sum_over_ranks([float(self._skip)], device)[0]:
            for parameter in parameters_of(optimizer):
                parameter.grad = None
            self._left_out()
        else:
            self._skipped_in_a_row = 0
        self._skip = False
        self._micro_batches = 0

    def _left_out(self) -> None:
        """Count a skipped step. The first one is logged; too many in a row raise an error.

        Raises:
            TrainingError: on every process, after `MOST_SKIPPED` in a row.
        """
        self.skipped += 1
        self._skipped_in_a_row += 1
        self._afterwards(False)
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise TrainingError(f"{MOST_SKIPPED} optimizer steps in a row were skipped: {self._reason}")
        if self.skipped == 1:
            logger.warning("optimizer step %d is skipped, as others may be: %s", self._run.steps + 1, self._reason)

    def _count(self) -> None:
        self._run.stepping = False
        self._run.steps += 1
        self._run.steps_seen += 1
        self._afterwards(True)

    def _warn_if_unasked(self, optimizer: Any) -> None:
        """Warn once if an optimizer made a step without a loss of the defenses."""
        if self._needing_loss and self._losses == self._losses_at_step.get(id(optimizer), 0):
            logger.warning(
                "the optimizer made a step without the loss of the defenses, so %s did nothing: "
                "call backward on defended.loss(batch), or add defended.regularizer() to your loss",
                self._needing_loss,
            )
            self._needing_loss = ""
        self._losses_at_step[id(optimizer)] = self._losses
