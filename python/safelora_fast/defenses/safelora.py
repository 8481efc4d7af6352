"""SafeLoRA during training: the adapter is brought back into the safe subspace after optimiser steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from safelora_fast.defenses.base import Defense
from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from safelora_fast.subspace import SafeSubspace
    from safelora_fast.training.anatomy import Anatomy


class SafeLora(Defense):
    """Projects every module's lora_B onto its safe subspace, B ← U_k·U_kᵀ·B, after every k-th optimiser step.

    Only this idempotent operator may be repeated: the paper's C = V·Vᵀ/‖V‖_F shrinks what it touches, and applied at
    each step it would drive B to zero geometrically. Every module is projected: the paper's selection needs V itself,
    for which U_k is no substitute.

    Args:
        subspace: the safe subspace of the model's aligned and base checkpoints.
        at: when to project: after optimiser steps.
        every: k, in optimiser steps, counted from the start of the run, also after a resume.
        operator: "orthogonal".

    Raises:
        SettingsError: an operator that shrinks, or a setting out of range.
    """

    name: ClassVar[str] = "safelora"

    def __init__(
        self,
        subspace: SafeSubspace,
        at: Literal["step"] = "step",
        every: int = 1,
        operator: Literal["orthogonal"] = "orthogonal",
    ) -> None:
        if at != "step":
            raise SettingsError(f'SafeLora: at is {at!r}, it must be "step"')
        if operator != "orthogonal":
            raise SettingsError(
                f"SafeLora: operator {operator!r} shrinks B each time that it is applied and would drive it to zero; "
                'at="step" takes operator="orthogonal"'
            )
        if every < 1:
            raise SettingsError(f"SafeLora: every is {every}, it must be at least 1")
        self.subspace = subspace
        self.every = every
        self.at = at
        self.operator = operator

    def __repr__(self) -> str:
        return f"SafeLora(at={self.at!r}, every={self.every}, operator={self.operator!r})"

    @property
    def active(self) -> bool:
        """Always."""
        return True

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a model with a module that the subspace does not fit."""
        from safelora_fast.training.safe_modules import SafeModules

        SafeModules(anatomy.model, self.subspace, owner="SafeLora")
