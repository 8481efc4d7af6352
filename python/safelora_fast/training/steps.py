"""Following the optimiser: its steps are counted, and one is left out when a defence is not finite."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

import torch

from safelora_fast.errors import SettingsError, TrainingError
from safelora_fast.training.distributed import sum_over_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.utils.hooks import RemovableHandle

    from safelora_fast.training.safe_modules import SafeModules

OnNonFinite = Literal["raise", "skip"]
MOST_SKIPPED = 20  # steps in a row
logger = logging.getLogger(__name__)


class Steps:
    """The optimiser's steps, counted by its hooks.

    Args:
        optimizer: the optimiser, or accelerate's or DeepSpeed's wrapper of it; None counts nothing.
        made: steps made before, when a run is resumed.
        on_nonfinite: "raise" the error of a defence that is not finite, or "skip" the step.
        afterwards: called after each step.

    Attributes:
        made: optimiser steps made.
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
        afterwards: Callable[[], None],
    ) -> None:
        if on_nonfinite not in {"raise", "skip"}:
            raise SettingsError(f'on_nonfinite is {on_nonfinite!r}, it must be "raise" or "skip"')
        self.made = made
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._reason = "a defence is not finite on another process"
        # Accelerate's wrapper is itself an Optimizer; DeepSpeed's is none, and steps the one inside it piece by piece.
        wrapped = isinstance(optimizer, torch.optim.Optimizer)
        self._optimizer = getattr(optimizer, "optimizer", optimizer) if wrapped else optimizer
        self._on_nonfinite = on_nonfinite
        self._afterwards = afterwards
        self._skip = False
        self._micro_batches = 0  # of the window so far

    @property
    def known(self) -> bool:
        """Whether there is an optimiser to follow, with hooks or not."""
        return self._optimizer is not None

    @property
    def coming(self) -> str:
        """The step that is coming, in words for a message; empty where steps are not counted."""
        return f" at optimiser step {self.made + 1}" if self.known else ""

    @property
    def _hooked(self) -> torch.optim.Optimizer | None:
        return self._optimizer if isinstance(self._optimizer, torch.optim.Optimizer) else None

    def check(self, trained: Iterable[tuple[str, SafeModules]]) -> None:
        """Refuse an optimiser of other parameters than those that the defences act on: they would do nothing.

        Args:
            trained: the name of each defence that acts on factors, and the modules that it acts on.

        Raises:
            SettingsError: with the module; or a step is to be skipped and the optimiser has no hooks.
        """
        if self._on_nonfinite == "skip" and self._hooked is None:
            raise SettingsError(
                'on_nonfinite="skip" needs the optimizer whose step it skips, and hooks before its steps, which '
                "DeepSpeed's lacks"
            )
        if self._hooked is None:
            return
        known = {id(parameter) for group in self._hooked.param_groups for parameter in group["params"]}
        for name, modules in trained:
            for module in modules.modules:
                if module.left.requires_grad and id(module.left) not in known:
                    raise SettingsError(
                        f"{name}: lora_B of {module.name} is not among the optimizer's parameters: shard the model "
                        "(fully_shard) and make the optimizer before defend()"
                    )

    def attach(self) -> list[RemovableHandle]:
        """Install the hooks, where the optimiser has some."""
        if self._hooked is None:
            return []
        return [
            self._hooked.register_step_pre_hook(self._before),
            self._hooked.register_step_post_hook(self._after),
        ]

    def not_finite(self, error: TrainingError) -> None:
        """Raise the error of a defence that is not finite, or leave out the step that is coming, on every process."""
        if self._on_nonfinite == "raise":
            raise error
        self._skip, self._reason = True, str(error)

    def micro_batch(self, window: int) -> None:
        """A micro-batch of a window of so many has come. The first of a new window forgets that a step was to be left out.

        A scaler of gradients that finds an infinity leaves out a step by itself, and no hook hears of it.
        """
        if self._micro_batches >= window:
            self._micro_batches, self._skip = 0, False
        self._micro_batches += 1

    def engine_stepped(self) -> None:
        """An optimiser without hooks has made a step; does nothing where hooks have counted it."""
        if self._hooked is None:
            self._count()

    def _before(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        if self._on_nonfinite != "skip":
            return
        device = optimizer.param_groups[0]["params"][0].device
        if sum_over_ranks([float(self._skip)], device)[0]:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
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
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise TrainingError(f"{MOST_SKIPPED} optimiser steps in a row were skipped: {self._reason}")
        if self.skipped == 1:
            logger.warning("optimiser step %d is skipped, as others may be: %s", self.made + 1, self._reason)

    def _after(self, _optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        self._count()

    def _count(self) -> None:
        self.made += 1
        self._afterwards()
