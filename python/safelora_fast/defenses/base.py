"""What every defence has in common, and what a batch defence is given."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from safelora_fast.defenses.step_cost import Extra
from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    import torch

    from safelora_fast.data.spans import Spans
    from safelora_fast.defenses.step_cost import Shape, Work
    from safelora_fast.models.anatomy import Anatomy
    from safelora_fast.models.capture import Capture

_REGISTRY: dict[str, type[Defense]] = {}


@dataclass(frozen=True)
class Observation:
    """One micro-batch as a batch defence sees it: hidden states of student and reference, and its tokens."""

    anatomy: Anatomy
    student: Capture
    reference: Capture
    spans: Spans


class Defense(ABC):
    """A defense against emergent misalignment that acts while a model is fine-tuned.

    A subclass that sets `name` is registered: it can be named in a recipe, and :func:`registered` lists it. Its
    constructor's arguments are its keys in the recipe.

    Attributes:
        name: its key in a recipe, and its name in metrics (`defense/<name>`) and messages.
        needs_reference: whether it compares the model with the reference model.
    """

    name: ClassVar[str]
    needs_reference: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            return
        known = _REGISTRY.setdefault(cls.name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise SettingsError(
                f"{cls.__qualname__}: the name {cls.name!r} is that of {known.__qualname__}: choose another"
            )
        _REGISTRY[cls.name] = cls

    @property
    @abstractmethod
    def active(self) -> bool:
        """False when its settings switch it off: then it costs nothing and changes nothing."""

    @abstractmethod
    def check(self, anatomy: Anatomy) -> None:
        """Refuse models that the defense is not right for.

        Raises:
            SettingsError: with the reason.
        """

    @property
    def needs_vectors(self) -> bool:
        """Whether its safe subspace, if it has one, must hold vectors and not only name its sources."""
        return True

    def cost(self, shape: Shape, work: Work) -> Extra:  # noqa: ARG002
        """Estimate what it adds to an optimizer step, for a dry run."""
        return Extra(0.0, 0.0, "cost not known")


def registered() -> dict[str, type[Defense]]:
    """Every defense that can be given by name, by name in alphabetical order."""
    return dict(sorted(_REGISTRY.items()))


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
    """A defense whose loss is a mean over units of the batch (tokens or sequences), relative to the reference."""

    needs_reference: ClassVar[bool] = True

    @abstractmethod
    def blocks(self, anatomy: Anatomy) -> list[int]:
        """Indices of the blocks whose outputs it needs."""

    @abstractmethod
    def units(self, spans: Spans) -> int:
        """Number of its units in a micro-batch."""

    @abstractmethod
    def total(self, observation: Observation) -> torch.Tensor:
        """Sum of its loss over the units of a micro-batch, without the weight: a differentiable float32 scalar."""
