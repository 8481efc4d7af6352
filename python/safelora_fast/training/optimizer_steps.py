"""Following the optimizer: its steps are counted, and one is left out when a defense is not finite."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from safelora_fast.errors import SettingsError, TrainingError
from safelora_fast.models.distributed import sum_over_ranks
from safelora_fast.models.shards import local_rows
from safelora_fast.training.optimizers import parameters_of, unwrapped, with_hooks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch
    from torch.utils.hooks import RemovableHandle

    from safelora_fast.defenses.parts.safe_modules import SafeModules

OnNonFinite = Literal["raise", "skip"]
MOST_SKIPPED = 20  # steps in a row
logger = logging.getLogger(__name__)


class Steps:
    """The optimizer's steps, counted by its hooks.

    Args:
        optimizer: the optimizer, or accelerate's or DeepSpeed's wrapper of it; None counts nothing.
        made: steps made before, when a run is resumed.
        on_nonfinite: "raise" the error of a defense that is not finite, or "skip" the step.
        afterwards: called after each step that was made (True) or left out (False).

    Attributes:
        made: optimizer steps made.
        heard: how many of them were heard of since this was made.
        skipped: how many of them were left out.

    Raises:
        SettingsError: `on_nonfinite` is unknown.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None,
        *,
        made: int,
        on_nonfinite: OnNonFinite,
        afterwards: Callable[[bool], None],
    ) -> None:
        if on_nonfinite not in {"raise", "skip"}:
            raise SettingsError(f'on_nonfinite is {on_nonfinite!r}, it must be "raise" or "skip"')
        self.made = made
        self.heard = 0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._reason = "a defence is not finite on another process"
        self.optimizer: Any = unwrapped(optimizer)
        self._hooked = with_hooks(self.optimizer)
        self._on_nonfinite = on_nonfinite
        self._afterwards = afterwards
        self._skip = False
        self._micro_batches = 0  # of the window so far
        self._losses = 0
        self._losses_at_step: dict[int, int] = {}
        self._unasked: str | None = None

    @property
    def known(self) -> bool:
        """Whether there is an optimizer to follow, with hooks or not."""
        return self.optimizer is not None

    @property
    def coming(self) -> str:
        """The step that is coming, in words for a message; empty where steps are not counted."""
        return f" at optimiser step {self.made + 1}" if self.known else ""

    def check(self, trained: Iterable[tuple[str, SafeModules]]) -> None:
        """Refuse an optimizer of other parameters than those that the defenses act on: they would do nothing.

        Args:
            trained: the name of each defense that acts on factors, and the modules that it acts on.

        Raises:
            SettingsError: with the module; or a step is to be skipped and the optimizer has no hooks.
        """
        if self._on_nonfinite == "skip" and self._hooked is None:
            raise SettingsError(
                'on_nonfinite="skip" needs the optimizer whose step it skips, and hooks before its steps, which '
                "DeepSpeed's and LOMO lack"
            )
        known = {id(parameter) for parameter in parameters_of(self.optimizer)}
        for name, modules in trained if self._hooked is not None else ():
            for module in modules.modules:
                if module.left.requires_grad and id(module.left) not in known:
                    raise SettingsError(
                        f"{name}: lora_B of {module.name} is not among the optimizer's parameters: shard the model "
                        "(fully_shard) and make the optimizer before defend(); layer-wise optimizers, which step in "
                        "backward, are not supported"
                    )

    def attach(self, parameters: Iterable[torch.Tensor] = (), *, unasked: str | None = None) -> list[RemovableHandle]:
        """Install the hooks, where the optimizer has some.

        Args:
            parameters: those of the model: any optimizer's step of them without a loss of the defenses is worth a word.
            unasked: the defenses that such a step would leave out, for that word; None where no loss is needed.
        """
        self._unasked = unasked
        handles: list[RemovableHandle] = []
        if unasked is not None:
            from torch.optim.optimizer import register_optimizer_step_post_hook

            ours = {id(parameter) for parameter in parameters}

            def any_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
                if any(id(parameter) in ours for parameter in parameters_of(optimizer)):
                    self._stepped(optimizer)

            handles.append(register_optimizer_step_post_hook(any_step))
        if self._hooked is not None:
            handles.append(self._hooked.register_step_pre_hook(self._before))
            handles.append(self._hooked.register_step_post_hook(self._after))
        return handles

    def not_finite(self, error: TrainingError) -> None:
        """Raise the error of a defense that is not finite, or leave out the step that is coming, on every process."""
        if self._on_nonfinite == "raise":
            raise error
        self._skip, self._reason = True, str(error)

    def micro_batch(self, window: int) -> None:
        """A micro-batch of a window of so many has come. The first of a new window forgets that a step was to be left out.

        A scaler of gradients that finds an infinity leaves out a step by itself, and no hook hears of it. A window whose
        totals were left out is as long as gradients are added up.
        """
        self._losses += 1
        if self._micro_batches >= window and not (self._skip and self._has_gradients()):
            if self._skip:
                self._afterwards(False)
            self._micro_batches, self._skip = 0, False
        self._micro_batches += 1

    def engine_stepped(self) -> None:
        """An optimizer without hooks has made a step; does nothing where hooks have counted it."""
        if self._hooked is None:
            self._stepped(self.optimizer)
            self._count()

    def _has_gradients(self) -> bool:
        """Whether any gradient on this process is not zero."""
        gradients = [parameter.grad for parameter in parameters_of(self.optimizer) if parameter.grad is not None]
        return any(bool(local_rows(gradient).any()) for gradient in gradients)

    def _before(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
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
        """Count a step that is left out; the first is worth a word, and many in a row are no training.

        Raises:
            TrainingError: on every process, after `MOST_SKIPPED` in a row.
        """
        self.skipped += 1
        self._skipped_in_a_row += 1
        self._afterwards(False)
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise TrainingError(f"{MOST_SKIPPED} optimiser steps in a row were skipped: {self._reason}")
        if self.skipped == 1:
            logger.warning("optimiser step %d is skipped, as others may be: %s", self.made + 1, self._reason)

    def _after(self, _optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        self._count()

    def _count(self) -> None:
        self.made += 1
        self.heard += 1
        self._afterwards(True)

    def _stepped(self, optimizer: Any) -> None:
        """Warn, once, of an optimizer's step for which no loss was asked."""
        if self._unasked is not None and self._losses == self._losses_at_step.get(id(optimizer), 0):
            logger.warning(
                "the optimizer made a step, but no loss of the defenses was asked for since the last one, so %s did nothing: "
                "call backward on defended.loss(batch), or add defended.regularizer() to your loss",
                self._unasked,
            )
            self._unasked = None
        self._losses_at_step[id(optimizer)] = self._losses
