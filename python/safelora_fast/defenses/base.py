"""The life cycle of a defense: what a defense may do to a model in training, and when it is asked.

In this order: `check` and `check_reference`, `attach`, `install`; at the first batch `check_batch`; at each micro-batch
`Attached.before_loss`, `units` and `loss`; after each optimizer step `Attached.after_step`; when training has ended well
`Attached.finish`. A dry run asks for `cost`, a model card for `card_line`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from safelora_fast.defenses.step_cost import Extra
from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch
    from torch import nn

    from safelora_fast.data.spans import Spans, Tokens
    from safelora_fast.defenses.step_cost import Shape, Work
    from safelora_fast.models.anatomy import Anatomy
    from safelora_fast.models.capture import Capture
    from safelora_fast.ops.linear_kl import SharedLoss
    from safelora_fast.projection.report import ProjectionReport

_REGISTRY: dict[str, type[Defense]] = {}


@dataclass(frozen=True)
class Observation:
    """One micro-batch as a defense sees it: its tokens, and the hidden states of the model and of the reference model."""

    anatomy: Anatomy
    student: Capture
    reference: Capture
    spans: Spans


@dataclass
class Run:
    """The training of one model, as an attached defense sees it.

    Attributes:
        model: the model with its wrappers.
        optimizer: the optimizer without accelerate's wrapper; None where no steps are followed.
        steps: optimizer steps made, those before a resume among them.
        steps_seen: optimizer steps seen since the defenses were attached.
        stepping: whether the optimizer is inside a step.
        metrics: latest values for the log; "cosine_min" is logged as `defense/cosine_min`.
    """

    model: nn.Module
    optimizer: Any = None
    steps: int = 0
    steps_seen: int = 0
    stepping: bool = False
    metrics: dict[str, float] = field(default_factory=dict)


class Attached:
    """What a defense keeps and does for one model in training. The methods of this class do nothing."""

    def factors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """(name, parameter) that the defense changes, and that the optimizer must therefore train."""
        return ()

    def start(self) -> None:
        """The hooks are installed; weights may still be loaded before the first micro-batch."""

    def before_loss(self) -> None:
        """A micro-batch has run."""

    def penalties(self) -> Sequence[tuple[str, torch.Tensor]]:
        """(module, value): a term of the loss that depends on weights alone. The sum counts once per optimizer step."""
        return ()

    def after_step(self) -> None:
        """The optimizer has made a step."""

    def finish(self) -> ProjectionReport | None:
        """Training has ended well; also called again, when it must do nothing. Collective."""

    def check_finished(self) -> None:
        """Refuse to save weights that have changed since `finish`."""


class Defense(ABC):
    """A defense against emergent misalignment that acts while a model is fine-tuned.

    A subclass that sets `name` is registered: a recipe can name it, and :func:`registered` lists it. The constructor's
    arguments are its keys in the recipe. Settings may be changed between steps; what belongs to one model is kept in
    :class:`Attached`.

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
        """Whether its settings switch it on. Off, it costs nothing and changes nothing."""

    @property
    def needs_vectors(self) -> bool:
        """Whether its safe subspace, if it has one, must hold vectors and not only name its sources."""
        return True

    def check(self, anatomy: Anatomy) -> None:  # noqa: B027
        """Raise SettingsError, with the reason, for models that the defense is not right for."""

    def check_reference(self, anatomy: Anatomy, reference: Anatomy) -> None:  # noqa: B027
        """Raise SettingsError for a reference model that the defense cannot compare the model with."""

    def check_batch(self, model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any]) -> None:  # noqa: B027
        """Raise SettingsError for what only the first batch shows."""

    def attach(self, run: Run) -> Attached | None:  # noqa: ARG002
        """Make what the defense keeps for this model; None where it keeps nothing.

        Raises:
            SafeLoraFastError: the model cannot be defended, with the reason.
        """
        return None

    def install(self, anatomy: Anatomy, engaged: Callable[[], bool]) -> Iterable[Any]:  # noqa: ARG002
        """Install hooks that act while `engaged()`. Returns the handles that remove them."""
        return ()

    def cost(self, shape: Shape, work: Work) -> Extra:  # noqa: ARG002
        """Estimate what it adds to an optimizer step, for a dry run."""
        return Extra(0.0, 0.0, "cost not known")

    def card_line(self, report: ProjectionReport | None) -> str:  # noqa: ARG002
        """What the model card says of it: one item of a Markdown list.

        Args:
            report: of the projection when training ended; None while there is none.
        """
        return f"`{self!r}`"


def registered() -> dict[str, type[Defense]]:
    """Every defense that can be given by name, by name in alphabetical order."""
    return dict(sorted(_REGISTRY.items()))


class Weighted(Defense):
    """A defense that adds a term to the loss.

    Args:
        weight: the factor λ of the term; it may be changed between steps.

    Raises:
        SettingsError: it is not a number, not finite or negative; also when it is changed.
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
    """A defense whose term is a mean over units of the batch (tokens or sequences), relative to the reference model.

    Args:
        weight: the factor λ of the term; it may be changed between steps.
        tokens: which tokens count: "all" that are not padding, those that predict a "completion" token, or those of
            "safe" examples (see :func:`~safelora_fast.interleave`).

    Attributes:
        shares_logits: whether :meth:`with_cross_entropy` computes the task's loss from the same logits.

    Raises:
        SettingsError: a setting is out of range.
    """

    needs_reference: ClassVar[bool] = True
    shares_logits: ClassVar[bool] = False

    def __init__(self, weight: float, tokens: Tokens = "all") -> None:
        super().__init__(weight)
        if tokens not in {"all", "completion", "safe"}:
            raise SettingsError(
                f'{type(self).__name__}: tokens is {tokens!r}, it must be "all", "completion" or "safe"'
            )
        self.tokens: Tokens = tokens

    def mask(self, spans: Spans) -> torch.Tensor:
        """The tokens that count, bool [batch, tokens]."""
        return spans.mask(self.tokens, owner=type(self).__name__)

    def recorded_layers(self, anatomy: Anatomy) -> list[int]:  # noqa: ARG002
        """Indices of the layers whose outputs it needs, of model and reference; none for the last hidden state alone."""
        return []

    @abstractmethod
    def units(self, spans: Spans) -> int:
        """Number of its units in a micro-batch."""

    @abstractmethod
    def loss(self, observation: Observation) -> torch.Tensor:
        """Sum of its loss over the units of a micro-batch, without the weight: a differentiable float32 scalar."""

    def with_cross_entropy(
        self,
        observation: Observation,
        *,
        weight: float,
        cross_entropy_weight: torch.Tensor | float,
        figures: bool = False,
    ) -> SharedLoss:
        """Sum of its loss over the units and of the task's cross-entropy over the labels, each with its weight.

        `weight` is that of one unit, `cross_entropy_weight` that of the negative log-likelihood of one label. `figures`
        asks for the values of every token too.
        """
        raise NotImplementedError


def checked(defenses: object) -> list[Defense]:
    """The defenses of a list that are switched on.

    Raises:
        SettingsError: it is not a list of defenses, or one is given twice.
    """
    if not isinstance(defenses, Sequence) or isinstance(defenses, str):
        raise SettingsError(f"defenses must be a list like [KL(0.1)], not {defenses!r}")
    for defense in defenses:
        if not isinstance(defense, Defense):
            raise SettingsError(f"defenses must be objects like KL(0.1), not {defense!r}")
    names = [defense.name for defense in defenses]
    if len(set(names)) != len(names):
        raise SettingsError(f"each defense may be given once, not {', '.join(names)}")
    return [defense for defense in defenses if defense.active]


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


def check_subspace(subspace: object, *, owner: str) -> None:
    """Refuse anything but a SafeSubspace, such as the name of its file.

    Raises:
        SettingsError: with what to do.
    """
    from safelora_fast.subspace.safe_subspace import SafeSubspace

    if not isinstance(subspace, SafeSubspace):
        raise SettingsError(
            f"{owner}: subspace must be a SafeSubspace, not {subspace!r}; SafeSubspace.load(file) reads one"
        )
