"""A model with its defences attached: `defend()` for plain loops, and the engine under the trainers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from safelora_fast.data.spans import Spans, read_spans
from safelora_fast.defenses.base import BatchDefense, Defense, Observation, check_still_off, checked
from safelora_fast.defenses.kl import KL
from safelora_fast.defenses.parts.safe_modules import SafeModules
from safelora_fast.defenses.safelora import SafeLora
from safelora_fast.defenses.steering import Steering
from safelora_fast.defenses.subspace_penalty import SubspacePenalty
from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import dissect, entrances
from safelora_fast.models.capture import Call, Capture, StudentRecorder, Tap
from safelora_fast.models.distributed import world_size
from safelora_fast.models.lora_factors import check_no_prompt_learning
from safelora_fast.models.reference_pass import Reference, ReferencePass, check_inputs
from safelora_fast.training.head_check import check_logits, check_same_head
from safelora_fast.training.loss_terms import batch_terms, penalty_term
from safelora_fast.training.metrics import Meter, Stopwatch
from safelora_fast.training.monitors import Drift
from safelora_fast.training.optimizer_steps import OnNonFinite, Steps
from safelora_fast.training.optimizers import has_modes
from safelora_fast.training.placement import Placement, check_gradients_are_shared
from safelora_fast.training.safelora_steps import Projections
from safelora_fast.training.shared_logits import SharedLogits, SharedTask, forward_without_logits
from safelora_fast.training.steering_mode import TrainingPasses
from safelora_fast.training.task_loss import TaskLoss
from safelora_fast.training.window import Totals, count_spans, count_totals

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from safelora_fast.defenses.drift_monitor import DriftMonitor
    from safelora_fast.ops.linear_kl import SharedLoss
    from safelora_fast.projection.report import ProjectionReport


def defend(
    model: nn.Module,
    defenses: Sequence[Defense],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    reference: Reference = "base",
    on_nonfinite: OnNonFinite = "raise",
    first_step: int = 0,
    share_logits: bool = True,
    monitors: Sequence[DriftMonitor] = (),
) -> Defended:
    """Attach defences to a model for a training loop of one's own; a context manager.

    ```python
    with defend(model, [KL(0.1)], optimizer=optimizer) as defended:
        for window in windows:                              # the micro-batches of one optimiser step
            totals = defended.totals(window)
            for batch in window:
                defended.loss(batch, totals=totals).backward()  # not divided by the number of micro-batches
            optimizer.step()
            optimizer.zero_grad()
    ```

    The loss is right for data-parallel training, where gradients are averaged over processes. Accelerate's
    `backward` divides by its own `gradient_accumulation_steps`: multiply the loss by it, or leave it at 1. So does
    DeepSpeed's, unless it is told `scale_wrt_gas=False`; after the engine's step call :meth:`Defended.engine_stepped`.

    SafeLora at the end projects the adapter when the context ends without an exception, or earlier by
    :meth:`Defended.finish`: save the adapter after that.

    Args:
        model: a causal language model of transformers, plain, sharded by `fully_shard`, or wrapped by PEFT,
            DistributedDataParallel and DeepSpeed's engine (ZeRO stages 1 and 2).
        defenses: the defences; those that are switched off (weight 0) cost nothing.
        optimizer: the optimiser whose steps are counted; needed to skip a step.
        reference: what the defences keep the model near: "base" (the same model, adapters disabled), the name of a
            frozen adapter of the model, or a second model.
        on_nonfinite: when a defence is NaN or infinite, "raise" `TrainingError` or "skip" the optimiser step.
        first_step: optimiser steps already made, when a run is resumed.
        share_logits: let the KL compute the task's loss too, from the same logits, where that is the plain
            cross-entropy of a causal model; the model's own head does not run then. Elsewhere the losses are computed
            apart, and the log says why. The result is the same.
        monitors: what :meth:`Defended.metrics` tells beside the defences; they change no loss.

    Raises:
        SettingsError: the model, the adapter and the defences do not go together.
        CheckpointError: the checkpoints that SafeLora needs at the end are gone, or have changed.
    """
    return Defended(
        model,
        defenses,
        optimizer=optimizer,
        reference=reference,
        on_nonfinite=on_nonfinite,
        first_step=first_step,
        share_logits=share_logits,
        monitors=monitors,
    )


class Defended:
    """Defences attached to a model; made by :func:`defend`.

    Attributes:
        defenses: the defences that are switched on.
    """

    def __repr__(self) -> str:
        defenses = ", ".join(map(repr, self.defenses)) or "no defense that is switched on"
        return f"Defended({type(self.model).__name__}, {defenses})"

    def __init__(
        self,
        model: nn.Module,
        defenses: Sequence[Defense],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        reference: Reference = "base",
        on_nonfinite: OnNonFinite = "raise",
        first_step: int = 0,
        share_logits: bool = True,
        monitors: Sequence[DriftMonitor] = (),
    ) -> None:
        active = checked(defenses)
        names = [defense.name for defense in defenses]
        if len(set(names)) != len(names):
            raise SettingsError(f"each defence may be given once, not {', '.join(names)}")
        self.model = model
        self.defenses = active
        self._off = [defense for defense in defenses if not defense.active]
        self._batch_defenses = [defense for defense in self.defenses if isinstance(defense, BatchDefense)]
        self._steps = Steps(optimizer, made=first_step, on_nonfinite=on_nonfinite, afterwards=self._after_step)
        self._handles: list[Any] = []
        self._attached = False
        self._recorder: StudentRecorder | None = None
        self._drift: Drift | None = None
        self._penalty: tuple[SubspacePenalty, SafeModules] | None = None
        self._spans: Spans | None = None
        self._head_to_check = False
        self._task_loss = TaskLoss()
        self._passes = TrainingPasses()
        self._meter = Meter()
        self._stopwatch = Stopwatch()
        self._projections = Projections(self._steps, self._meter, self._stopwatch)
        if self.defenses or monitors:
            self._prepare(reference, monitors)
            kl = next((defense for defense in self._batch_defenses if isinstance(defense, KL)), None)
            self._sharing = SharedLogits(self.anatomy, kl, wanted=share_logits)
            self._head_to_check = kl is not None
            if kl is not None:
                check_same_head(self.anatomy, self._reference.anatomy)

    @property
    def projection_report(self) -> ProjectionReport | None:
        """What SafeLora did at the end; None before, and where it does nothing then."""
        return self._projections.report

    @property
    def step(self) -> int:
        """Optimiser steps made."""
        return self._steps.made

    @step.setter
    def step(self, made: int) -> None:
        self._steps.made = made

    def _prepare(self, reference: Reference, monitors: Sequence[DriftMonitor]) -> None:
        self.anatomy = dissect(self.model)
        self._placement = Placement(self.model)
        blocks = sorted({index for defense in self._batch_defenses for index in defense.blocks(self.anatomy)})
        watched = blocks
        if monitors:
            self._drift = Drift(monitors, self.anatomy)
            watched = [*blocks, *self._drift.blocks]
        if self._batch_defenses or monitors:
            check_no_prompt_learning(self.model)
        if self._batch_defenses:
            self._reference = ReferencePass(self.model, self.anatomy, reference, blocks)
        if self._batch_defenses or monitors:
            run_reference = self._run_reference if self._batch_defenses else None
            self._recorder = StudentRecorder(Tap(self.anatomy, watched), run_reference, entrances(self.model))
        for defense in self.defenses:
            defense.check(self.anatomy)
            if isinstance(defense, SubspacePenalty):
                self._penalty = (
                    defense,
                    SafeModules(self.anatomy.model, defense.subspace, owner="SubspacePenalty", exclude=defense.exclude),
                )
            elif isinstance(defense, SafeLora):
                self._projections.add(defense, self.model, self.anatomy)

    def _after_step(self, made: bool) -> None:
        """After an optimizer step, made or left out."""
        self._meter.close(made=made)
        if self._drift is not None:
            self._drift.close(made=made)
        if made:
            self._projections.after(self.step)

    def _run_reference(self, whole: Call | None, decoder: Call) -> Capture:
        with self._stopwatch.running():
            return self._reference.run(whole, decoder, around=self._passes.running)

    def __enter__(self) -> Defended:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.detach()

    def finish(self) -> ProjectionReport | None:
        """Project the adapter in place, if SafeLora is to do so at the end; the second call does nothing. Collective.

        The context of :func:`defend` calls it when it ends without an exception.

        Returns:
            The report, also kept as `projection_report`; None where there is nothing to do.

        Raises:
            SafeLoraFastError: the sources of V have changed, or a factor is NaN or infinite; the model is as it was.
        """
        return self._projections.finish()

    def attach(self) -> None:
        """Install the hooks; does nothing when they are in, or when every defence is switched off and nothing is watched."""
        if self._attached or not (self.defenses or self._drift):
            return
        acting = self._projections.acting()
        if self._penalty is not None:
            acting.append(("SubspacePenalty", self._penalty[1]))
        self._steps.check(acting)
        self._attached = True
        reference = self._reference.anatomy if self._batch_defenses else None
        for defense in self.defenses:
            if isinstance(defense, Steering):
                self._handles.extend(self._passes.steer(defense, self.anatomy, reference))
        if self._recorder is not None:
            self._recorder.attach()
        if self._batch_defenses:
            self._reference.tap.attach()
        self._projections.watch(begun=False)
        through_loss = [type(given).__name__ for given in self.defenses if not isinstance(given, SafeLora | Steering)]
        through_loss += ["the monitors"] if self._drift is not None else []
        unasked = " and ".join(through_loss) or None
        self._handles.extend(self._steps.attach(self.model.parameters(), unasked=unasked))

    def detach(self) -> None:
        """Take the hooks out; the model is as it was found."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._attached = False
        if self._recorder is not None:
            self._recorder.detach()
        if self._batch_defenses:
            self._reference.tap.detach()

    def totals(self, micro_batches: Sequence[Mapping[str, Any]]) -> Totals:
        """Count the units of one optimiser step, over all its micro-batches and all processes. Collective."""
        return count_totals(self._batch_defenses, micro_batches)

    def loss(self, batch: Mapping[str, Any], *, totals: Totals | None = None) -> torch.Tensor:
        """Task loss plus defences of one micro-batch, scaled so that the window's losses add up.

        Args:
            batch: what the model takes as keyword arguments, labels among them; and `safe`, where rows are tagged.
            totals: the window's denominators, from :meth:`totals`; None makes this micro-batch the whole window.

        Raises:
            TrainingError: a defence is NaN or infinite.
            SettingsError: the model gives no loss, or was wrapped for data-parallel training after it was given.
        """
        check_gradients_are_shared(self.model)
        spans = read_spans(batch)
        if totals is None:
            totals = count_spans(self._batch_defenses, [spans])
        if self.shares_logits(self.model, batch):
            return self.shared_loss(self.model, batch, totals, label_weight=world_size() / max(totals.labels, 1))[0]
        with self.recording(batch):
            task = self._task_loss.of(self.model, batch, spans, totals)
        return task + self.regularizer(totals).to(task.device)

    def shares_logits(self, model: nn.Module, batch: Mapping[str, Any], *, unless: str | None = None) -> bool:
        """Whether :meth:`shared_loss` gives the loss of this batch; if not, the log says why, once.

        Args:
            model: the model with its wrappers, as it is going to be called.
            batch: what it is going to be called with.
            unless: a reason of the caller's against it.
        """
        return bool(self.defenses) and self._sharing.allowed(model, batch, unless=unless)

    def share_no_more(self, reason: str) -> None:
        """Compute the task's loss and the KL apart from now on."""
        self._sharing.refuse(reason)

    def shared_loss(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        totals: Totals,
        *,
        label_weight: torch.Tensor | float,
        factor: float = 1.0,
        figures: bool = False,
    ) -> tuple[torch.Tensor, SharedLoss]:
        """Task loss and defences of one micro-batch, the task's cross-entropy from the logits of the KL.

        Args:
            model: the model with its wrappers.
            batch: what it takes as keyword arguments, labels among them.
            totals: the window's denominators.
            label_weight: what the negative log-likelihood of one label counts in the task loss.
            factor: multiplies the defences, not the task loss.
            figures: whether the second result has the figures of every token.

        Returns:
            The loss, and the KL's part of it, the task loss among its figures.

        Raises:
            TrainingError: a defence is NaN or infinite, unless the step is to be skipped.
        """
        with self.recording(batch):
            logits = forward_without_logits(model, batch)
        task = SharedTask(label_weight, figures)
        loss = self._regularizer(totals, factor, task)
        assert task.shared is not None  # noqa: S101
        return (loss if logits is None else loss + logits.sum()), task.shared

    @contextmanager
    def recording(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Record the model's training pass on `batch` that happens inside, for :meth:`regularizer`.

        Raises:
            SettingsError: the defences are not attached, or the KL cannot make the logits of this model.
        """
        if not self._attached and (self.defenses or self._drift):
            raise SettingsError("the defences are not attached to the model: use them inside `with defend(...)`")
        check_still_off(self._off)
        if self._attached:
            self._placement.check()
        if self._head_to_check:
            self._head_to_check = False
            check_logits(self.model, self.anatomy, batch)
        with self._passes.running():
            if self._recorder is None:
                yield
                return
            self._spans = read_spans(batch)
            if self._batch_defenses:
                check_inputs(Call((), batch))
            with self._recorder.recording():
                yield

    def regularizer(self, totals: Totals) -> torch.Tensor:
        """The defences' part of the loss, from the pass just recorded: a float32 scalar to add to the task loss.

        It is right where the losses of the window's micro-batches are added up and gradients averaged over processes.

        Raises:
            TrainingError: a defence is NaN or infinite, unless the step is to be skipped.
        """
        return self._regularizer(totals, 1.0, None)

    def _regularizer(self, totals: Totals, factor: float, task: SharedTask | None) -> torch.Tensor:
        self._steps.micro_batch(totals.micro_batches)
        self._meter.micro_batch(1.0 / totals.micro_batches)
        self._projections.watch()
        with self._stopwatch.running():
            terms = torch.zeros(())
            if self._recorder is not None:
                try:
                    terms = self._of_batch(totals, factor, task)
                finally:
                    self._recorder.forget()
                    self._spans = None
            if self._penalty is not None:
                penalty = penalty_term(*self._penalty, totals, meter=self._meter, steps=self._steps)
                terms = terms + factor * penalty.to(terms.device)
        return terms

    def _of_batch(self, totals: Totals, factor: float, task: SharedTask | None) -> torch.Tensor:
        student, spans = self._recorded()
        if self._drift is not None:
            self._drift.observe(student, spans)
        if not self._batch_defenses:
            return torch.zeros(())
        assert self._recorder is not None  # noqa: S101
        assert self._recorder.reference is not None  # noqa: S101
        return batch_terms(
            self._batch_defenses,
            Observation(self.anatomy, student, self._recorder.reference, spans),
            totals,
            factor=factor,
            task=task,
            meter=self._meter,
            steps=self._steps,
        )

    def _recorded(self) -> tuple[Capture, Spans]:
        student = None if self._recorder is None else self._recorder.student
        if student is None or self._spans is None:
            raise SettingsError("regularizer() needs a pass recorded by recording() before it")
        hidden = student.hidden
        if hidden is None or hidden.shape[:2] != self._spans.real.shape:
            shape = None if hidden is None else tuple(hidden.shape)
            raise SettingsError(
                f"the batch has tokens {tuple(self._spans.real.shape)}, the decoder gave hidden states {shape}"
            )
        return student, self._spans

    def metrics(self) -> dict[str, float]:
        """Means per optimiser step since the last call, over all processes, for a log. Collective.

        `defense/<name>` is a defence's mean before its weight. `defense/modules_projected` and `defense/cosine_min`
        (the lowest cosine of P_k·ΔW and ΔW just before; at the end, of C·ΔW and ΔW) tell of the last projection.
        `defense/steps_skipped` counts, from the start, the steps left out because a defence was not finite.
        `defense/time_share` is the share of this process's time spent in the reference pass, in the defences' forward
        (not in their part of backward), and in projections at a step. `monitor/<name>` is a monitor's projection.
        """
        names = [defense.name for defense in self.defenses if isinstance(defense, BatchDefense | SubspacePenalty)]
        figures = self._meter.read(names)
        if self._steps.skipped:
            figures["defense/steps_skipped"] = float(self._steps.skipped)
        if figures:
            figures["defense/time_share"] = self._stopwatch.read()
        if self._drift is not None:
            figures.update(self._drift.read())
        return figures

    def engine_stepped(self) -> None:
        """Say that an optimiser without step hooks has made a step: call it after the `step()` of a DeepSpeed engine.

        Likewise after LOMO's `fused_backward`. Does nothing where the optimizer has hooks, which count the steps.
        """
        self._steps.engine_stepped()

    @property
    def steps_in_backward(self) -> bool:
        """Whether the optimizer makes its steps in backward (LOMO)."""
        return hasattr(self._steps.optimizer, "fused_backward")

    def optimizer_to_evaluation(self) -> None:
        """Have an optimizer with modes (schedule-free) put the weights for evaluation into the model, if it has not."""
        if has_modes(self._steps.optimizer):
            self._steps.optimizer.eval()

    def check_projected(self) -> None:
        """Refuse weights that are not what SafeLora projected at the end; does nothing before.

        Raises:
            TrainingError: with the first factor that has changed since.
        """
        self._projections.check()
