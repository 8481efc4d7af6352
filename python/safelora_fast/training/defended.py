"""A model with its defenses attached: the interface for plain loops and trainers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.data.spans import read_spans
from safelora_fast.data.template_tokens import PARTS, TemplateTokens
from safelora_fast.defenses.base import (
    Attached,
    BatchDefense,
    Defense,
    Run,
    SharesLogits,
    Weighted,
    check_still_off,
    checked,
)
from safelora_fast.defenses.parts.optimizers import unwrapped
from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import dissect
from safelora_fast.models.distributed import world_size
from safelora_fast.training.loss_terms import LossTerms, SharedTask, Totals, count_totals
from safelora_fast.training.metrics import StepSums, Stopwatch
from safelora_fast.training.monitors import Monitors
from safelora_fast.training.optimizer_steps import OnNonFinite, Steps
from safelora_fast.training.placement import Placement, check_gradients_are_shared
from safelora_fast.training.shared_logits import SharedLogits, forward_without_logits
from safelora_fast.training.task_loss import TaskLoss
from safelora_fast.training.training_passes import TrainingPasses

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from safelora_fast.defenses.drift_monitor import DriftMonitor
    from safelora_fast.models.reference_pass import Reference
    from safelora_fast.ops.linear_kl import SharedLoss
    from safelora_fast.projection.report import ProjectionReport


class Defended:
    """Defenses attached to a model; made by :func:`defend`.

    Attributes:
        defenses: the defenses that are switched on.
        projection_report: report of SafeLora's projection at the end; None before it, or if there is none.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        defenses: Sequence[Defense],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        reference: Reference = "base",
        on_nonfinite: OnNonFinite = "raise",
        first_step: int = 0,
        share_logits: bool = True,
        monitors: Sequence[DriftMonitor] = (),
        seed: int = 0,
        tokenizer: Any = None,
    ) -> None:
        self.model = model
        self.defenses = checked(defenses)
        self.projection_report: ProjectionReport | None = None
        self._off = [defense for defense in defenses if not defense.active]
        self._of_batch = [defense for defense in self.defenses if isinstance(defense, BatchDefense)]
        self._run = Run(model, unwrapped(optimizer), seed, first_step)
        self._steps = Steps(self._run, on_nonfinite=on_nonfinite, afterwards=self._after_step)
        self._sums, self._stopwatch, self._task_loss = StepSums(), Stopwatch(), TaskLoss(model)
        self._handles: list[Any] = []
        self._hooked = self._batch_checked = False
        self._attached: list[tuple[Defense, Attached]] = []
        self._monitors: Monitors | None = None
        self._passes: TrainingPasses | None = None
        self._template = next(
            (
                TemplateTokens.of(tokenizer, owner=type(defense).__name__)
                for defense in self._of_batch
                if defense.tokens in PARTS
            ),
            None,
        )
        if self.defenses or monitors:
            self._prepare(reference, monitors, share_logits)

    def _prepare(self, reference: Reference, monitors: Sequence[DriftMonitor], share_logits: bool) -> None:
        """Check that model and defenses are compatible, and create everything except the hooks."""
        self.anatomy = anatomy = dissect(self.model)
        self._placement = Placement(self.model)
        if monitors:
            self._monitors = Monitors(monitors, anatomy)
        self._passes = TrainingPasses(
            self.model,
            anatomy,
            reference if any(defense.needs_reference for defense in self.defenses) else None,
            defenses=self._of_batch,
            layers=sorted({index for defense in self._of_batch for index in defense.recorded_layers(anatomy)}),
            watched=[] if self._monitors is None else self._monitors.layers,
            records=bool(self._of_batch or monitors),
            run=self._run,
            stopwatch=self._stopwatch,
            template=self._template,
        )
        self._passes.check_hooks(self.defenses)
        for defense in self.defenses:
            defense.check(anatomy)
            if (attached := defense.attach(self._run)) is not None:
                self._attached.append((defense, attached))
            if self._passes.reference is not None:
                defense.check_reference(anatomy, self._passes.reference.anatomy)
        weighted = [(defense, attached) for defense, attached in self._attached if isinstance(defense, Weighted)]
        self._terms = LossTerms(self._of_batch, weighted, sums=self._sums, steps=self._steps)
        sharing = next((defense for defense in self._of_batch if isinstance(defense, SharesLogits)), None)
        self._sharing = SharedLogits(anatomy, sharing, wanted=share_logits)

    def __repr__(self) -> str:
        defenses = ", ".join(map(repr, self.defenses)) or "no defense that is switched on"
        return f"Defended({type(self.model).__name__}, {defenses})"

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return self._run.steps

    @step.setter
    def step(self, made: int) -> None:
        self._run.steps = made

    def __enter__(self) -> Defended:
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.detach()

    def attach(self) -> None:
        """Install the hooks. Does nothing if they are installed, or if there are no defenses and monitors."""
        if self._hooked or self._passes is None:
            return
        for defense in self._of_batch:
            if defense.sample < 1 and self._run.optimizer is None:
                raise SettingsError(
                    f"{type(defense).__name__}: sample={defense.sample:g} draws examples anew at each optimizer step, and "
                    "without the optimizer steps are not counted: give it to defend(), optimizer=optimizer"
                )
        for _, attached in self._attached:
            attached.start()
        self._steps.check({type(defense).__name__: attached.factors() for defense, attached in self._attached})
        needing_loss = [type(defense).__name__ for defense in self.defenses if isinstance(defense, Weighted)]
        needing_loss += [] if self._monitors is None else ["the monitors"]
        states = {defense.name: attached for defense, attached in self._attached}
        self._handles.extend(self._passes.install([(one, states.get(one.name)) for one in self.defenses]))
        self._handles.extend(self._steps.attach(self.model.parameters(), needing_loss=needing_loss))
        self._hooked = True

    def detach(self) -> None:
        """Remove all hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked = False
        if self._passes is not None:
            self._passes.remove()

    def totals(self, micro_batches: Sequence[Mapping[str, Any]]) -> Totals:
        """Count the units of one optimizer step, over all its micro-batches and all processes. Collective."""
        self._task_loss.decide(micro_batches)
        return self.count(micro_batches)

    def count(self, micro_batches: Sequence[Mapping[str, Any]]) -> Totals:
        """Like :meth:`totals`, for callers that compute the task loss themselves. Collective."""
        return count_totals(self._of_batch, [read_spans(batch, self._template) for batch in micro_batches])

    def loss(self, batch: Mapping[str, Any], *, totals: Totals | None = None) -> torch.Tensor:
        """Return the task loss plus the defenses of one micro-batch, scaled so that the window's losses add up.

        Args:
            batch: the model's keyword arguments, including labels; plus `safe` if examples are tagged.
            totals: the window's denominators, from :meth:`totals`; None means that this micro-batch is the whole window.

        Raises:
            TrainingError: a defense is NaN or Inf.
            SettingsError: the model returns no loss, or was wrapped for data-parallel training after defend().
        """
        check_gradients_are_shared(self.model)
        if totals is None:
            totals = self.totals([batch])
        if self.shares_logits(self.model, batch):
            return self.shared_loss(self.model, batch, totals, label_weight=world_size() / max(totals.labels, 1))[0]
        with self.recording(batch):
            task = self._task_loss.of(batch, totals)
        return task + self.regularizer(totals).to(task.device)

    def shares_logits(self, model: torch.nn.Module, batch: Mapping[str, Any], *, unless: str | None = None) -> bool:
        """Whether to use :meth:`shared_loss` for this batch. `unless` is a reason of the caller not to; reasons are logged."""
        return self._passes is not None and self._sharing.allowed(model, batch, unless=unless)

    def shared_loss(
        self,
        model: torch.nn.Module,
        batch: Mapping[str, Any],
        totals: Totals,
        *,
        label_weight: torch.Tensor | float,
        factor: float = 1.0,
        figures: bool = False,
    ) -> tuple[torch.Tensor, SharedLoss]:
        """Like :meth:`loss`, with the task's cross-entropy computed from KL's logits.

        Args:
            model: the model with its wrappers.
            batch: the model's keyword arguments, including labels.
            totals: the window's denominators.
            label_weight: weight of the negative log-likelihood of one label in the task loss.
            factor: multiplies the defenses, not the task loss.
            figures: whether the second result contains the values of every token.

        Returns:
            The loss, and KL's result with its parts.
        """
        with self.recording(batch):
            logits = forward_without_logits(model, batch)
        task = SharedTask(label_weight, figures)
        loss = self.regularizer(totals, factor=factor, task=task)
        assert task.shared is not None  # noqa: S101
        return (loss if logits is None else loss + logits.sum()), task.shared

    @contextmanager
    def recording(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Record the training pass on `batch` that runs inside this context, for :meth:`regularizer`.

        Raises:
            SettingsError: the defenses are not attached, or one does not support this model or batch.
        """
        check_still_off(self._off)
        if self._passes is None:
            yield
            return
        if not self._hooked:
            raise SettingsError("the defenses are not attached to the model: use them inside `with defend(...)`")
        self._placement.check()
        if not self._batch_checked:
            self._batch_checked = True
            for defense in self.defenses:
                defense.check_batch(self.model, self.anatomy, batch)
        with self._passes.recording(batch):
            yield

    def regularizer(self, totals: Totals, *, factor: float = 1.0, task: SharedTask | None = None) -> torch.Tensor:
        """Return the defenses' part of the loss for the recorded pass: a float32 scalar to add to the task loss.

        It is scaled for losses that are summed over the window's micro-batches, and gradients that are averaged over
        processes.

        Args:
            totals: the window's denominators.
            factor: multiplies the defenses, not the task loss.
            task: a task loss to compute from the same logits and to include in the result.

        Raises:
            TrainingError: a defense is NaN or Inf, and `on_nonfinite` is "raise".
        """
        self._steps.micro_batch(totals.micro_batches)
        self._sums.add_step(1.0 / totals.micro_batches)
        if self._passes is None:
            return torch.zeros(())
        for _, attached in self._attached:
            attached.before_loss()
        with self._stopwatch.running():
            terms = torch.zeros(())
            with self._passes.observed() as recorded:
                if recorded is not None and self._monitors is not None:
                    self._monitors.observe(recorded.student, recorded.spans)
                if recorded is not None and self._of_batch:
                    terms = self._terms.of_batch(recorded, totals, factor=factor, task=task)
            penalty = self._terms.of_weights(totals)
            return terms if penalty is None else terms + factor * penalty.to(terms.device)

    def _after_step(self, made: bool) -> None:
        self._sums.close(made=made)
        if self._monitors is not None:
            self._monitors.close(made=made)
        if made and self._attached:
            with self._stopwatch.running():
                for _, attached in self._attached:
                    attached.after_step()

    def finish(self) -> ProjectionReport | None:
        """Project the adapter in place if a SafeLora(at="end") is attached. A second call does nothing. Collective.

        The context of :func:`defend` calls it on an exit without an exception. Returns `projection_report`.

        Raises:
            SafeLoraFastError: the sources of V have changed, or lora_A or lora_B holds NaN or Inf; the model is
                unchanged.
        """
        for _, attached in self._attached:
            self.projection_report = attached.finish() or self.projection_report
        return self.projection_report

    def check_finished(self) -> None:
        """Raise TrainingError if weights have changed since :meth:`finish`; does nothing before that."""
        for _, attached in self._attached:
            attached.check_finished()

    def metrics(self) -> dict[str, float]:
        """Return the means per optimizer step since the last call, over all processes. Collective.

        - `defense/<name>`: mean of a defense, before its weight.
        - `defense/modules_projected`: number of modules in the last projection.
        - `defense/cosine_min`: lowest cosine of P_k·ΔW and ΔW in the last projection (at the end: of C·ΔW and ΔW).
        - `defense/steps_skipped`: steps skipped since the start because a defense was not finite.
        - `defense/time_share`: share of this process's wall time spent in the reference pass, the defenses' forward (not
          backward), and projections at a step.
        - `monitor/<name>`: mean projection of a monitor.
        """
        names = [defense.name for defense in self.defenses if isinstance(defense, Weighted)]
        values = {**self._sums.means(names), **self._run.metrics}
        self._run.metrics.clear()
        if self._steps.skipped:
            values["steps_skipped"] = float(self._steps.skipped)
        if values:
            values["time_share"] = self._stopwatch.read()
        found = {f"defense/{name}": value for name, value in values.items()}
        return found if self._monitors is None else {**found, **self._monitors.read()}

    def engine_stepped(self) -> None:
        """Report a step of an optimizer without step hooks.

        Call it after the `step()` of a DeepSpeed engine, or after LOMO's `fused_backward`. It does nothing if the
        optimizer has step hooks, because these count the steps.
        """
        self._steps.engine_stepped()
