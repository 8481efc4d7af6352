"""SafeLoRA's projections of a model in training: after optimiser steps, and once at the end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from safelora_fast.errors import SettingsError
from safelora_fast.training.finish import EndProjection
from safelora_fast.training.safe_modules import SafeModules

if TYPE_CHECKING:
    from torch import nn

    from safelora_fast.defenses.safelora import SafeLora
    from safelora_fast.posthoc.report import ProjectionReport
    from safelora_fast.training.anatomy import Anatomy
    from safelora_fast.training.metrics import Meter, Stopwatch


class Projections:
    """Projects the adapter when SafeLora says so.

    Args:
        meter: told what each projection changed.
        stopwatch: counts the projections after a step.

    Attributes:
        report: of the projection at the end; None before, and where there is none.
    """

    def __init__(self, meter: Meter, stopwatch: Stopwatch) -> None:
        self._meter, self._stopwatch = meter, stopwatch
        self._at_step: tuple[SafeLora, SafeModules] | None = None
        self._end: EndProjection | None = None
        self.report: ProjectionReport | None = None

    def add(self, defense: SafeLora, model: nn.Module, anatomy: Anatomy) -> None:
        """Do what a defence asks for.

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

    def acting(self, *, known: bool) -> list[tuple[str, SafeModules]]:
        """What is projected after steps, with whose it is.

        Args:
            known: whether there is an optimiser whose steps can be followed.

        Raises:
            SettingsError: there is none, and something is to be projected.
        """
        if self._at_step is None:
            return []
        if not known:
            raise SettingsError('SafeLora: at="step" needs the optimizer whose steps it follows: optimizer=')
        return [("SafeLora", self._at_step[1])]

    def after(self, step: int) -> None:
        """Project, where that is due after the step of this number."""
        if self._at_step is None:
            return
        defense, modules = self._at_step
        if step % defense.every == 0:
            with self._stopwatch.running():
                self._meter.set("cosine_min", modules.project(step))
                self._meter.set("modules_projected", float(len(modules.modules)))

    def finish(self) -> ProjectionReport | None:
        """Project at the end, if that is asked for; the second call does nothing. Collective.

        Raises:
            SafeLoraFastError: the sources of V have changed, or a factor is NaN or infinite; the model is as it was.
        """
        if self._end is None or self.report is not None:
            return self.report
        self.report = self._end.run()
        (adapter,) = self.report.adapters
        cosines = [module.cosine for module in adapter.modules if not math.isnan(module.cosine)]
        self._meter.set("cosine_min", min(cosines, default=math.nan))
        self._meter.set("modules_projected", float(len(adapter.projected)))
        return self.report
