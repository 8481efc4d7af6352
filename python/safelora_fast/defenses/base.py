"""Base classes of defenses: what a defense can do to a model in training, and when each method is called.

Order of the calls:

- before training: `check`, `attach`, `check_reference`, `Attached.start`, `install`
- before each optimizer step: `units`, for all its micro-batches
- first micro-batch: `check_batch`
- each micro-batch: `Attached.before_pass`, `Attached.before_loss`, `loss`, `Attached.penalties`
- after each optimizer step: `Attached.after_step`
- after training without an exception: `Attached.finish`

A dry run calls `cost`, and a model card calls `card_line`.
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
    from safelora_fast.models.capture import Capture, Pick
    from safelora_fast.ops.linear_kl import SharedLoss
    from safelora_fast.projection.report import ProjectionReport

_REGISTRY: dict[str, type[Defense]] = {}


@dataclass(frozen=True)
class Observation:
    """Examples of one micro-batch: their tokens, and the hidden states of the model and of the reference model.

    A defense that compares with the reference model observes only the part of the micro-batch that such defenses look at.
    One that keeps what the reference model gave observes the whole micro-batch.

    Attributes:
        reference: that of the model itself where no reference pass ran.
        attached: the state of the defense whose loss is computed.
    """

    anatomy: Anatomy
    student: Capture
    reference: Capture
    spans: Spans
    attached: Attached | None = None


@dataclass
class Run:
    """State of one training run, shared with the attached defenses.

    Attributes:
        model: the model with its wrappers.
        optimizer: the optimizer without accelerate's wrapper; None if steps are not counted.
        seed: seed of the draws of examples.
        steps: optimizer steps made, including those before a resume.
        steps_seen: optimizer steps seen since the defenses were attached.
        stepping: whether the optimizer is inside a step.
        metrics: latest values for the log; "cosine_min" is logged as `defense/cosine_min`.
    """

    model: nn.Module
    optimizer: Any = None
    seed: int = 0
    steps: int = 0
    steps_seen: int = 0
    stepping: bool = False
    metrics: dict[str, float] = field(default_factory=dict)


class Attached:
    """State and callbacks of a defense for one model in training. By default every method does nothing."""

    def factors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Return the (name, parameter) pairs that the defense changes. The optimizer must train them."""
        return ()

    def start(self) -> None:
        """Called when hooks are installed. Weights may still be loaded before the first micro-batch."""

    def picks(self, anatomy: Anatomy, *, of_reference: bool) -> Mapping[str, Pick]:  # noqa: ARG002
        """Return what `Capture.picked` should hold by name: a module, and a function from its output to a tensor.

        Called after `start`, for passes of the model in training and for those of the reference model, which may run on a
        part of the batch.
        """
        return {}

    def before_pass(self, batch: Mapping[str, Any], spans: Spans) -> torch.Tensor | None:  # noqa: ARG002
        """Called before the forward pass of each micro-batch, if a defense needs the reference.

        Returns:
            The tokens for which the reference must run, bool [batch, tokens]; None for those that the defense looks at.
        """
        return None

    def before_loss(self) -> None:
        """Called after the forward pass of each micro-batch, before the loss terms are computed."""

    def penalties(self) -> Sequence[tuple[str, torch.Tensor]]:
        """Return (module, value) loss terms that depend on weights alone. Their sum counts once per optimizer step."""
        return ()

    def after_step(self) -> None:
        """Called after each optimizer step."""

    def finish(self) -> ProjectionReport | None:
        """Called when training has ended without an exception. Later calls must do nothing. Collective."""

    def check_finished(self) -> None:
        """Raise TrainingError if weights have changed since `finish`."""


class Defense(ABC):
    """A defense against emergent misalignment that acts while a model is fine-tuned.

    A subclass that sets `name` is registered: recipes can use it, and :func:`registered` lists it. The constructor's
    arguments are its keys in the recipe. Settings may be changed between steps. State that belongs to one model goes
    into :class:`Attached`.

    Attributes:
        name: key in a recipe, and name in metrics (`defense/<name>`) and messages.
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
        """Whether its settings switch it on. A defense that is off costs nothing and changes nothing."""

    @property
    def needs_vectors(self) -> bool:
        """Whether its safe subspace, if any, must contain vectors; otherwise the names of its sources suffice."""
        return True

    def check(self, anatomy: Anatomy) -> None:  # noqa: B027
        """Raise SettingsError, with the reason, for a model that the defense does not support."""

    def check_reference(self, anatomy: Anatomy, reference: Anatomy) -> None:  # noqa: B027
        """Raise SettingsError for a reference model that the defense cannot compare the model with."""

    def check_batch(self, model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any]) -> None:  # noqa: B027
        """Raise SettingsError for problems that only show on the first batch."""

    def attach(self, run: Run) -> Attached | None:  # noqa: ARG002
        """Create the defense's state for this model; None if it needs none.

        Raises:
            SafeLoraFastError: the defense does not support the model; the message gives the reason.
        """
        return None

    def install(self, anatomy: Anatomy, engaged: Callable[[], bool]) -> Iterable[Any]:  # noqa: ARG002
        """Install hooks that act while `engaged()` is true. Return the handles that remove them."""
        return ()

    def cost(self, shape: Shape, work: Work) -> Extra:  # noqa: ARG002
        """Estimate the compute and memory that it adds to an optimizer step, for a dry run."""
        return Extra(0.0, 0.0, "cost not known")

    def reference_share(self, work: Work) -> float:  # noqa: ARG002
        """Estimate the share of a step's tokens that the reference model runs on for it, for a dry run."""
        return float(self.needs_reference)

    def card_line(self, report: ProjectionReport | None) -> str:  # noqa: ARG002
        """Return its line in the model card, the text of one Markdown list item.

        Args:
            report: report of the projection at the end of training; None before that projection.
        """
        return f"`{self!r}`"


def registered() -> dict[str, type[Defense]]:
    """Return all registered defense classes by name, in alphabetical order."""
    return dict(sorted(_REGISTRY.items()))


class Weighted(Defense):
    """A defense that adds a term to the loss.

    Args:
        weight: coefficient λ of the term; it may be changed between steps.

    Raises:
        SettingsError: the weight is not a number, not finite, or negative; also raised when the weight is set later.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight

    @property
    def weight(self) -> float:
        """Coefficient λ of the term in the loss."""
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
        weight: coefficient λ of the term; it may be changed between steps.
        tokens: which tokens count: "all" (except padding), "completion" (tokens that predict a completion token), or
            "safe" (tokens of safe examples, see :func:`~safelora_fast.interleave`).
        sample: share of these examples that is drawn at each optimizer step, above 0. The others cost no reference pass.
            The term is divided by it, so that its expected value and gradient are those of all examples.

    Attributes:
        keeps_reference: whether it keeps what the reference gave, so that most micro-batches need no reference pass:
            `Attached.before_pass` says which tokens do.
        token_choices: the values that `tokens` may have.

    Raises:
        SettingsError: a setting is out of range.
    """

    needs_reference: ClassVar[bool] = True
    keeps_reference: ClassVar[bool] = False
    token_choices: ClassVar[tuple[str, ...]] = ("all", "completion", "safe")

    def __init__(self, weight: float, tokens: Tokens = "all", sample: float = 1.0) -> None:
        super().__init__(weight)
        if tokens not in self.token_choices:
            *others, last = (f'"{choice}"' for choice in self.token_choices)
            raise SettingsError(
                f"{type(self).__name__}: tokens is {tokens!r}, it must be {', '.join(others)} or {last}"
            )
        if not isinstance(sample, int | float) or not 0 < sample <= 1:
            raise SettingsError(
                f"{type(self).__name__}: sample is {sample!r}, it must be a share of the examples, above 0 and at most 1"
            )
        self.tokens: Tokens = tokens
        self.sample = float(sample)

    def mask(self, spans: Spans) -> torch.Tensor:
        """Return the mask of the tokens that count, bool [batch, tokens]."""
        return spans.mask(self.tokens, owner=type(self).__name__)

    def reference_share(self, work: Work) -> float:
        """Estimate the share of a step's tokens that the reference model runs on for it, for a dry run."""
        looked_at = work.safe / max(work.tokens, 1) if self.tokens == "safe" else 1.0
        return super().reference_share(work) * self.sample * looked_at

    def recorded_layers(self, anatomy: Anatomy) -> list[int]:  # noqa: ARG002
        """Return the indices of the layers whose outputs it needs; empty if it needs only the last hidden state."""
        return []

    @abstractmethod
    def units(self, spans: Spans) -> int:
        """Return the number of its units in a micro-batch."""

    @abstractmethod
    def loss(self, observation: Observation) -> torch.Tensor:
        """Return its loss summed over the units of a micro-batch, without the weight: a differentiable float32 scalar."""


class SharesLogits(BatchDefense):
    """A defense that computes logits, and can compute the task loss from the same ones."""

    @abstractmethod
    def with_cross_entropy(
        self,
        observation: Observation,
        *,
        weight: float,
        cross_entropy_weight: torch.Tensor | float,
        figures: bool = False,
    ) -> SharedLoss:
        """Return the weighted sum of its loss over the units plus that of the cross-entropy over the labels.

        Args:
            observation: the whole micro-batch; the states of the reference model are zero where it did not run.
            weight: weight of one unit.
            cross_entropy_weight: weight of the negative log-likelihood of one label.
            figures: also return the values of every token.
        """


def checked(defenses: object) -> list[Defense]:
    """Return the defenses of a list that are switched on.

    Raises:
        SettingsError: `defenses` is not a list of defenses, or a defense is given twice.
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
    """Raise SettingsError if a defense was switched on after the others were attached: its hooks are not installed.

    Args:
        off: the defenses that were switched off when the others were attached.

    Raises:
        SettingsError: names the defense.
    """
    for defense in off:
        if defense.active:
            raise SettingsError(
                f"{type(defense).__name__} was switched off (0) when it was attached, and has been switched on since: begin "
                "with a small value such as 1e-6, which may be raised and lowered at any step"
            )


def check_subspace(subspace: object, *, owner: str) -> None:
    """Raise SettingsError unless `subspace` is a SafeSubspace; a file name, for example, is not.

    Raises:
        SettingsError: says how to load one.
    """
    from safelora_fast.subspace.safe_subspace import SafeSubspace

    if not isinstance(subspace, SafeSubspace):
        raise SettingsError(
            f"{owner}: subspace must be a SafeSubspace, not {subspace!r}; SafeSubspace.load(file) reads one"
        )
