"""What every defence has in common, and what a batch defence is given."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    import torch

    from safelora_fast.data.spans import Spans
    from safelora_fast.models.anatomy import Anatomy
    from safelora_fast.models.capture import Capture


@dataclass(frozen=True)
class Observation:
    """One micro-batch as a batch defence sees it: hidden states of student and reference, and its tokens."""

    anatomy: Anatomy
    student: Capture
    reference: Capture
    spans: Spans


class Defense(ABC):
    """A defence against emergent misalignment that acts while a model is fine-tuned.

    Attributes:
        name: its name in metrics (`defense/<name>`) and messages.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def active(self) -> bool:
        """False when its settings switch it off: then it costs nothing and changes nothing."""

    @abstractmethod
    def check(self, anatomy: Anatomy) -> None:
        """Refuse models that the defence is not right for.

        Raises:
            SettingsError: with the reason.
        """


def checked(defenses: object) -> list[Defense]:
    """The defences of a list that are switched on.

    Raises:
        SettingsError: it is no list of defences.
    """
    if not isinstance(defenses, Sequence) or isinstance(defenses, str):
        raise SettingsError(f"defenses must be a list like [KL(0.1)], not {defenses!r}")
    for defense in defenses:
        if not isinstance(defense, Defense):
            raise SettingsError(f"defenses must be objects like KL(0.1), not {defense!r}")
    return [defense for defense in defenses if defense.active]


def check_subspace(subspace: object, *, owner: str) -> None:
    """Refuse what is no SafeSubspace, such as the name of its file.

    Raises:
        SettingsError: with what to do.
    """
    from safelora_fast.subspace.safe_subspace import SafeSubspace

    if not isinstance(subspace, SafeSubspace):
        raise SettingsError(
            f"{owner}: subspace must be a SafeSubspace, not {subspace!r}; SafeSubspace.load(file) reads one"
        )


def check_still_off(off: Sequence[Defense]) -> None:
    """Refuse a defense that was switched on after it was attached: what it needs is not in the model.

    Args:
        off: the defenses that were switched off then.

    Raises:
        SettingsError: with the defense.
    """
    for defense in off:
        if defense.active:
            raise SettingsError(
                f"{type(defense).__name__} was switched off (0) when it was attached, and has been switched on since: begin "
                "with a small value such as 1e-6, which may be raised and lowered at any step"
            )


class Weighted(Defense):
    """A defense that adds a term to the loss.

    Args:
        weight: the factor λ of the term; it may be changed between steps.

    Raises:
        SettingsError: it is no number, not finite or negative; also when it is changed.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight

    @property
    def weight(self) -> float:
        """The factor λ of the term in the loss."""
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        if not isinstance(weight, int | float) or not (math.isfinite(weight) and weight >= 0):
            raise SettingsError(
                f"{type(self).__name__}: weight is {weight!r}, it must be a number, finite and not negative"
            )
        self._weight = float(weight)

    @property
    def active(self) -> bool:
        """Whether the weight is not zero."""
        return self.weight != 0


class BatchDefense(Weighted):
    """A defence whose loss is a mean over units of the batch (tokens or sequences), relative to the reference."""

    @abstractmethod
    def blocks(self, anatomy: Anatomy) -> list[int]:
        """Indices of the blocks whose outputs it needs."""

    @abstractmethod
    def units(self, spans: Spans) -> int:
        """Number of its units in a micro-batch."""

    @abstractmethod
    def total(self, observation: Observation) -> torch.Tensor:
        """Sum of its loss over the units of a micro-batch, without the weight: a differentiable float32 scalar."""
