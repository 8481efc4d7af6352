"""Defenses for the Trainer of transformers: a mixin for any subclass, and the plain trainer with that mixin."""

from __future__ import annotations

import logging
import weakref
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate.utils import DynamoBackend
from transformers import Trainer, TrainerCallback

from safelora_fast.data.collate import TaggedCollator
from safelora_fast.data.interleave import SAFE
from safelora_fast.data.spans import read_spans, without_tags
from safelora_fast.defenses.base import check_still_off, checked
from safelora_fast.defenses.parts.optimizers import has_modes, unwrapped
from safelora_fast.errors import SettingsError
from safelora_fast.trainers.card import write_defenses
from safelora_fast.trainers.loss_by_source import SourceLosses
from safelora_fast.trainers.trainer_loss import label_weight, report, reports_figures, why_apart
from safelora_fast.training.defended import Defended

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from safelora_fast.defenses.base import Defense
    from safelora_fast.defenses.drift_monitor import DriftMonitor
    from safelora_fast.models.reference_pass import Reference
    from safelora_fast.projection.report import ProjectionReport
    from safelora_fast.training.loss_terms import Totals
    from safelora_fast.training.optimizer_steps import OnNonFinite

if TYPE_CHECKING:
    Mixed: TypeAlias = Trainer
else:
    Mixed = object  # at run time, the trainer follows the mixin in the MRO
logger = logging.getLogger(__name__)


class DefendedMixin(Mixed):  # type: ignore[misc]
    """Adds defenses to a Trainer. It must be the first base: `class MyDefendedTrainer(DefendedMixin, MyTrainer)`.

    `get_batch_samples` counts the units of each defense over all micro-batches of an optimizer step. `compute_loss`
    adds the defenses while the model is in training mode; in evaluation it returns the plain task loss. The metrics of
    the defenses go to the trainer's log.

    SafeLora(at="end") projects the adapter when training ends without an exception. This happens after the best model
    is loaded, if requested, and before other callbacks run `on_train_end`. Checkpoints saved during training, including
    the best one, contain the adapter before projection, so a resumed run ends like an uninterrupted one. `save_model()`
    after `train()` saves the projected adapter. An optimizer with modes (schedule-free) is then in evaluation mode. The
    model cards (README.md) of saved folders name the defenses and state whether the adapter is projected.

    If the training examples are tagged by :func:`~safelora_fast.interleave`, defenses can be limited to safe examples.
    With TRL, the log then has the loss by source, `loss/task` and `loss/safe`.

    Args:
        *args: passed to the trainer.
        defenses: the defenses. If all are switched off and there are no monitors, the trainer is unchanged.
        reference: as for :func:`~safelora_fast.training.defend`, like the next three.
        on_nonfinite: see there.
        share_logits: see there.
        monitors: see there.
        **kwargs: passed to the trainer.

    Attributes:
        projection_report: report of SafeLora's projection at the end of the last training; None before.

    Raises:
        SettingsError: the model, the adapter, the trainer's arguments and the defenses are not compatible.
        CheckpointError: checkpoints that SafeLora needs at the end are gone or have changed.
    """

    data_collator: Any

    def __init__(
        self,
        *args: Any,
        defenses: Sequence[Defense] = (),
        reference: Reference = "base",
        on_nonfinite: OnNonFinite = "raise",
        share_logits: bool = True,
        monitors: Sequence[DriftMonitor] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.projection_report: ProjectionReport | None = None
        self._defended: Defended | None = None
        self._finished: Defended | None = None
        self._window: Totals | None = None
        self._losses_defended = 0
        self._disagreement: str | None = None  # how the trainer's loss differs from the loss from KL's logits
        self._source_losses: SourceLosses | None = None
        if _may_be_tagged(getattr(self, "train_dataset", None)):
            self.data_collator = TaggedCollator(self.data_collator)
            self._source_losses = SourceLosses()
        self._followed = False
        self.use_defenses(
            defenses, reference=reference, on_nonfinite=on_nonfinite, share_logits=share_logits, monitors=monitors
        )

    def use_defenses(
        self,
        defenses: Sequence[Defense],
        *,
        reference: Reference = "base",
        on_nonfinite: OnNonFinite = "raise",
        share_logits: bool = True,
        monitors: Sequence[DriftMonitor] = (),
    ) -> None:
        """Set the defenses after construction, before training. The arguments are those of the constructor.

        Raises:
            SettingsError: see the class.
            CheckpointError: see the class.
        """
        self.defenses = checked(defenses)
        self._defenses_off = [defense for defense in defenses if not defense.active]
        self._defend = partial(
            Defended,
            reference=reference,
            on_nonfinite=on_nonfinite,
            share_logits=share_logits,
            monitors=monitors,
            seed=self.args.seed,
            tokenizer=getattr(self, "processing_class", None),
        )
        followed, self._followed = self._followed, bool(self.defenses or monitors)
        if self._followed:
            if not followed:
                self.add_callback(_Follower(self))
                # First callback, so that trackers are still open and upload the projected adapter.
                self.callback_handler.callbacks.insert(0, self.callback_handler.callbacks.pop())
            _check_trainer(self)
            if getattr(self, "model", None) is not None:
                self._defend(self.model, self.defenses)  # raises before training if something is not compatible

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with the defenses attached; they are detached at the end, also after an exception.

        Raises:
            TrainingError: a callback has changed some of the weights that SafeLora projected at the end.
        """
        self._finished = self.projection_report = None
        try:
            output = super().train(*args, **kwargs)
            if self._defended is not None:
                self.projection_report = self._defended.finish()  # callbacks may have put other weights into the model
                self._finished = self._defended
            return output
        finally:
            if self._defended is not None:
                self._defended.detach()
                self._defended = None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any, **kwargs: Any
    ) -> tuple[list[Any], Any]:
        """Fetch the micro-batches of one optimizer step, and count the defenses' units in them."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
        if self._followed and batches:
            defended = self._attached()
            defended.step = self.state.global_step
            self._window = defended.count(batches)
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return the trainer's own loss, plus the defenses in training mode."""
        items, kwargs = num_items_in_batch, {**kwargs, "num_items_in_batch": num_items_in_batch}
        check_still_off(self._defenses_off)
        if not self._followed or not model.training:
            return self._task_loss(model, inputs, return_outputs, kwargs)
        if self._window is None:
            raise SettingsError(
                "the window's batches were not counted: the trainer must call super().get_batch_samples()"
            )
        defended = self._attached()
        divided = self._divides_by_accumulation(items)
        factor = self.current_gradient_accumulation_steps if divided else 1
        self._losses_defended += 1
        owner = _task_owner(type(self))
        apart = self._disagreement or ("the outputs are requested" if return_outputs else self.why_apart(owner))
        if defended.shares_logits(model, inputs, unless=apart):
            shared = self._shared_loss(model, inputs, factor, owner, items)
            if shared is not None:
                return shared
            defended.shares_logits(model, inputs, unless=self._disagreement)  # logs it
        with defended.recording(inputs):
            result = self._task_loss(model, inputs, return_outputs, kwargs)
        loss = result[0] if return_outputs else result
        loss = loss + factor * defended.regularizer(self._window).to(loss.device)
        return (loss, result[1]) if return_outputs else loss

    def why_apart(self, owner: type) -> str | None:
        """Return why the task loss may not be the plain cross-entropy of the labels; None if it is.

        Override it for a trainer whose `compute_loss` is known to leave that loss as it is.

        Args:
            owner: the class whose `compute_loss` computes the task loss.
        """
        return why_apart(self, owner)

    def _task_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool, kwargs: Mapping[str, Any]
    ) -> Any:
        """The trainer's own loss, computed without the tags. Records the loss by source."""
        losses = self._source_losses if SAFE in inputs and model.training else None
        plain = without_tags(inputs) if SAFE in inputs else inputs
        with nullcontext() if losses is None else losses.watching(model, inputs):
            return super().compute_loss(model, plain, return_outputs=return_outputs, **kwargs)

    def _shared_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], factor: int, owner: type, items: Any
    ) -> torch.Tensor | None:
        """The loss, with the task part from KL's logits; None if the trainer's own loss turns out to be different."""
        assert self._window is not None  # noqa: S101
        defended, figures = self._attached(), reports_figures(owner)
        weight = label_weight(self, Trainer if figures else owner, inputs, items)
        loss, shared = defended.shared_loss(
            model, inputs, self._window, label_weight=weight, factor=factor, figures=figures
        )
        if shared.tokens is not None:
            task = super().compute_loss
            theirs, ours = report(task, shared.tokens, without_tags(inputs), items), weight * shared.cross_entropy
            if self._source_losses is not None:
                self._source_losses.add(read_spans(inputs), shared.tokens.nll)
            if not torch.isclose(theirs.to(ours), ours, rtol=1e-4, atol=0.0, equal_nan=True):
                self._disagreement = f"{owner.__name__} makes {theirs.item():.6g} of a loss of {ours.item():.6g}"
                return None
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the trainer's own forward and backward.

        Raises:
            SettingsError: a subclass computes the loss without calling `super().compute_loss`.
        """
        before = self._losses_defended
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self._followed and self._losses_defended == before:
            raise SettingsError(
                f"{type(self).__name__}.compute_loss bypasses the defenses: put the mixin before the trainer that "
                "overrides it, or call super().compute_loss"
            )
        if self._steps_in_backward and self._defended is not None:
            self._defended.engine_stepped()
        return loss

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the model as the trainer does, and name the defenses in its model card.

        Raises:
            TrainingError: the weights have changed since SafeLora projected them at the end.
        """
        self.check_projected()
        super().save_model(*args, **kwargs)
        self._write_defenses(args[0] if args else kwargs.get("output_dir"))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the trainer's own model card, with the defenses added."""
        super().create_model_card(*args, **kwargs)
        self._write_defenses(None)

    def _write_defenses(self, folder: str | None) -> None:
        if self.defenses and self.args.should_save:
            write_defenses(folder or self.args.output_dir, self.defenses, self.projection_report)

    def check_projected(self) -> None:
        """Raise TrainingError if weights have changed since SafeLora's projection; does nothing before that.

        Raises:
            TrainingError: names the first changed tensor.
        """
        if self._finished is not None:
            self._finished.check_finished()

    def _load_best_model(self) -> None:
        if self._defended is not None and has_modes(optimizer := unwrapped(self.optimizer)):
            optimizer.eval()  # otherwise the optimizer would treat the loaded weights as its training weights
        super()._load_best_model()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and add the metrics of the defenses and the losses by source to logs of the training loss."""
        if self._source_losses is not None and "loss" in logs:
            logs.update(self._source_losses.read())
        if self._defended is not None and "loss" in logs:
            logs.update(self._defended.metrics())
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if _may_be_tagged(getattr(self, "train_dataset", None)) and SAFE not in self._signature_columns:
            self._signature_columns.append(SAFE)

    def finish_defenses(self) -> None:
        """Called when training has ended without an exception: project, and log the metrics."""
        defended = self._attached()
        self.projection_report = defended.finish()
        if self.projection_report is not None:
            self.log(defended.metrics())
            if self.args.should_save and self.args.save_strategy != "no":
                self.tell_of_checkpoints()

    def tell_of_checkpoints(self) -> None:
        """Warn that checkpoints contain the adapter before projection. Called after SafeLora has projected it."""
        best = self.state.best_model_checkpoint
        logger.warning(
            "SafeLora has projected the adapter of the model; the checkpoints in %s%s hold it as it was trained: "
            "save_model() writes the projected one",
            self.args.output_dir,
            "" if best is None else f" (the best one, {best}, too)",
        )

    def step_ended(self) -> None:
        """Called after each optimizer step, made or skipped."""
        if self._defended is not None and not self._steps_in_backward:
            self._defended.engine_stepped()

    @property
    def _steps_in_backward(self) -> bool:
        """Whether the optimizer steps in backward (LOMO)."""
        return hasattr(unwrapped(self.optimizer), "fused_backward")

    def _attached(self) -> Defended:
        if self._defended is None:
            self._defended = self._defend(
                self.model, self.defenses, optimizer=self.optimizer, first_step=self.state.global_step
            )
            self._defended.attach()
        return self._defended

    def _divides_by_accumulation(self, items: Any) -> bool:
        """Whether the trainer divides this loss by the number of micro-batches (see `Trainer.training_step`)."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None
        return not scaled


class _Follower(TrainerCallback):  # type: ignore[misc]
    """Forwards the callbacks for optimizer steps and for the end of training to the trainer."""

    def __init__(self, trainer: DefendedMixin) -> None:
        self._trainer = weakref.proxy(trainer)  # a strong reference would keep the trainer and its data loader alive

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Called after each optimizer step."""
        self._trainer.step_ended()

    def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Called after the last step, when the best model has been loaded."""
        self._trainer.finish_defenses()


class DefendedTrainer(DefendedMixin, Trainer):  # type: ignore[misc]
    """The Trainer of transformers with defenses; see :class:`DefendedMixin`."""


def _task_owner(kind: type) -> type:
    """The class whose `compute_loss` follows the mixin's in the MRO."""
    order = kind.__mro__
    return next(base for base in order[order.index(DefendedMixin) + 1 :] if "compute_loss" in vars(base))


def _may_be_tagged(data: Any) -> bool:
    """Whether examples may have the boolean tag of safe examples. True for a stream whose columns are not known."""
    if isinstance(data, list | tuple):
        return bool(data) and isinstance(data[0], dict) and isinstance(data[0].get(SAFE), bool)
    if not hasattr(data, "column_names"):
        return False
    feature = (data.features or {SAFE: None}).get(SAFE, "")
    return feature is None or "bool" in {
        getattr(part, "dtype", "") for part in (feature, getattr(feature, "feature", ""))
    }


def _check_trainer(trainer: Any) -> None:
    if trainer.args.n_gpu > 1:
        raise SettingsError(
            "several GPUs in one process make the Trainer use DataParallel, which drops the defenses' hooks: start one "
            "process per device (torchrun or accelerate launch), or set CUDA_VISIBLE_DEVICES"
        )
    if trainer.args.torch_compile or trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise SettingsError(
            "torch_compile wraps the model and hides the modules that the defenses hook: compile it in place, model.compile()"
        )
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage not in {1, 2}:
        raise SettingsError("DeepSpeed is supported with ZeRO stages 1 and 2: choose one of them, or use DDP or FSDP2")
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    for kind in ("tp", "cp", "sp"):
        if parallel is not None and getattr(parallel, f"{kind}_size", 1) > 1:
            raise SettingsError(f"{kind}_size > 1 splits sequences or weights in ways that defenses do not support")
