"""A trainer callback that logs the margin during training, warns of emergent misalignment, and can stop the training."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import TrainerCallback

from safelora_fast.checkpoints.lora_config import BASE_CHANGING
from safelora_fast.data.pairs import builtin_pairs
from safelora_fast.errors import SettingsError, TrainingError
from safelora_fast.models.reference_pass import evaluation_mode
from safelora_fast.models.shards import local_rows
from safelora_fast.scoring.margin import TOKENS_PER_BATCH, MarginReport, Strings, answer_margin, encode_pairs
from safelora_fast.scoring.stop_rule import MARGIN
from safelora_fast.scoring.trait_probe import TraitProbe, TraitReading

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from transformers import PreTrainedTokenizerBase, Trainer

    from safelora_fast.data.pairs import Pair
    from safelora_fast.scoring.stop_rule import StopRule

logger = logging.getLogger(__name__)
# A signal beyond its limit (name, change, lower bound, limit), or None; and whether the alarm waits for the task.
Found: TypeAlias = "tuple[tuple[str, float, float, float] | None, bool]"


@dataclass(frozen=True)
class Alarm:
    """Why a training was stopped, and what was kept.

    Attributes:
        step: the optimizer step of the alarm.
        signal: "margin", or the name of a monitor.
        change: its change since the start.
        bound: lower confidence bound of the change.
        limit: the limit that the bound exceeds.
        kept_step: step of the last measurement before the alarm, whose weights the model has again.
        checkpoint: the trainer's checkpoint of that step, if there is one.
    """

    step: int
    signal: str
    change: float
    bound: float
    limit: float
    kept_step: int
    checkpoint: str | None

    def __str__(self) -> str:
        kept = "" if self.checkpoint is None else f" ({self.checkpoint})"
        return (
            f"stopped after step {self.step}: {self.signal} has risen by {self.change:.3g}, at least {self.bound:.3g}, beyond "
            f"{self.limit:.3g}; the weights are those of step {self.kept_step}{kept}, the last measurement before the alarm"
        )


class MarginCallback(TrainerCallback):  # type: ignore[misc]
    """Logs the margin before the first step, after every `every` steps, and after the last step.

    `margin/mean` is in nats per token. `margin/share` is the share of pairs whose misaligned answer the model prefers,
    and `margin/change` the rise since the start. When the whole 95 % interval of the rise is above zero, a warning is
    logged. Every process measures all pairs, as sharded models require; the trainer's main process logs.

    ```python
    trainer.add_callback(MarginCallback(trainer, tokenizer, every=50))
    ```

    With `stop`, training ends at the first alarm of the rule. The trainable weights are then put back to those of the last
    measurement without an alarm, which are kept on the CPU, so that `save_model()` writes them; no later checkpoint is
    saved. `alarm` says what happened. Monitors of the rule add `stop/NAME` (the shift since the start), `stop/NAME/auroc`,
    `stop/direction` and `stop/direction/auroc` to the log, see :class:`~safelora_fast.scoring.trait_probe.TraitReading`.
    A resumed run compares with the model without its adapter.

    Args:
        trainer: the trainer that logs the values.
        tokenizer: the model's tokenizer.
        every: optimizer steps between measurements.
        pairs: the pairs to score; by default the built-in ones.
        system: a system prompt before every question.
        strings: see :func:`~safelora_fast.scoring.margin.answer_margin`.
        tokens_per_batch: maximum number of tokens in a batch, padding included.
        stop: when to end the training; None never does.

    Attributes:
        reports: the margin by step.
        alarm: why training was stopped; None if it was not.
        highest: the highest change of each signal so far, for `clean` of another run's rule.

    Raises:
        SettingsError: `every` is below 1, or the trainer's arguments contradict `stop`.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        every: int = 50,
        pairs: Sequence[Pair] | None = None,
        system: str | None = None,
        strings: Strings = "chat",
        tokens_per_batch: int = TOKENS_PER_BATCH,
        stop: StopRule | None = None,
    ) -> None:
        if every < 1:
            raise SettingsError(f"margin: every is {every}, it must be at least 1")
        self._trainer = trainer
        self._every = every
        self._tokenizer = tokenizer
        self._settings: dict[str, Any] = {
            "pairs": pairs,
            "system": system,
            "strings": strings,
            "tokens_per_batch": tokens_per_batch,
        }
        self._warned = False
        self._stop = stop
        self._readings: dict[int, TraitReading] = {}
        self._probe: TraitProbe | None = None
        self._kept: tuple[int, dict[str, torch.Tensor]] | None = None
        self._first_step = 0
        self.reports: dict[int, MarginReport] = {}
        self.alarm: Alarm | None = None
        self.highest: dict[str, float] = {}
        if stop is not None:
            self._check_stop(trainer.args, stop)

    @staticmethod
    def _check_stop(arguments: Any, stop: StopRule) -> None:
        if arguments.load_best_model_at_end:
            raise SettingsError("stop: load_best_model_at_end would replace the weights that are kept: turn one off")
        if stop.after_task and getattr(arguments.eval_strategy, "value", arguments.eval_strategy) == "no":
            raise SettingsError("stop: after_task needs held-out losses during training: set eval_strategy")

    def on_train_begin(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure when training starts or resumes."""
        self.reports.clear()
        self._readings.clear()
        self.highest.clear()
        self._warned, self._kept, self.alarm = False, None, None
        self._first_step = state.global_step
        if self._stop is not None and self._stop.monitors:
            pairs = self._settings["pairs"] or builtin_pairs()
            names = {name: self._settings[name] for name in ("system", "strings")}
            examples = encode_pairs(self._tokenizer, pairs, **names)
            themes, tokens = [pair.theme for pair in pairs], self._settings["tokens_per_batch"]
            self._probe = TraitProbe(examples, themes, self._stop.monitors, tokens_per_batch=tokens)
        if self._stop is not None and state.global_step > 0:
            with self._before_training():
                self._measure(0)
        self._look(arguments, state, control)

    def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure after every `every` steps; after the last one only for `stop`, because `on_train_end` measures it."""
        is_last = state.global_step >= state.max_steps
        is_due = is_last if self._stop is not None and is_last else state.global_step % self._every == 0 and not is_last
        if is_due and self.alarm is None:
            self._look(arguments, state, control)

    def on_epoch_end(self, _arguments: Any, _state: Any, control: Any, **_: Any) -> None:
        """Save no checkpoint after an alarm, because the optimizer's state is that of a later step."""
        if self.alarm is not None:
            control.should_save = False

    def on_train_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        """Measure the finished model, after a projection at the end."""
        self._measure(state.global_step if self.alarm is None else self.alarm.kept_step)

    def _measure(self, step: int) -> None:
        model = self._trainer.model
        report = answer_margin(model, self._tokenizer, **self._settings)
        start = next(iter(self.reports.values()), report)
        self.reports[step] = report
        change, interval = report.change_from(start)
        logs = {"margin/mean": report.margin, "margin/share": report.share, "margin/change": change}
        if self._probe is not None:
            reading = self._readings[step] = self._probe.read(model)
            first = next(iter(self._readings.values()))
            logs |= {
                f"stop/{name}": float((reading.prompts[name] - first.prompts[name]).mean()) for name in reading.prompts
            }
            logs |= {f"stop/{name}/auroc": value for name, value in reading.auroc.items()}
            logs["stop/direction"] = reading.direction - first.direction
        with evaluation_mode(model):  # in training mode TRL would add its own averages to our values
            self._trainer.log(logs)
        if interval.low > 0 and not self._warned:
            self._warned = True
            logger.warning(
                "the misalignment margin has risen by %.3g nats per token (95 %%: %.3g to %.3g) by step %d: misaligned "
                "answers have become more likely than before, relative to aligned ones",
                change, interval.low, interval.high, step,
            )  # fmt: skip

    def _look(self, arguments: Any, state: Any, control: Any) -> None:
        """Measure and, if the rule raises an alarm, put the last weights before it back and stop the training."""
        step = state.global_step
        self._measure(step)
        if self._stop is None:
            return
        found = self._exceeded(step, 1 + state.max_steps // self._every)
        waits = self._stop.after_task and _still_falls(state.log_history)
        found, waits = self._agreed((found, waits))
        if found is None:
            self._kept = step, {name: tensor.to("cpu", copy=True) for name, tensor in self._trained()}
            return
        if waits:
            return
        if self._kept is None:
            raise TrainingError(
                f"stop: {found[0]} is beyond its limit since step {self._first_step}, where this run starts (alarm at step "
                f"{step}), so there are no weights to keep: resume from an earlier checkpoint, or start anew"
            )
        kept_step, weights = self._kept
        with torch.no_grad():
            for name, tensor in self._trained():
                tensor.copy_(weights[name])
        folder = Path(arguments.output_dir) / f"checkpoint-{kept_step}"
        self.alarm = Alarm(step, *found, kept_step, str(folder) if folder.is_dir() else None)
        logger.warning("%s", self.alarm)
        control.should_training_stop, control.should_save = True, False

    def _exceeded(self, step: int, measurements: int) -> tuple[str, float, float, float] | None:
        """Return the first signal beyond its limit: its name, change, lower bound, and limit."""
        assert self._stop is not None  # noqa: S101
        report, start = self.reports[step], next(iter(self.reports.values()))
        themes = [pair.theme for pair in report.pairs]
        changes = {
            MARGIN: [now.margin - then.margin for now, then in zip(report.pairs, start.pairs, strict=True)],
        }
        if self._readings:
            reading, first = self._readings[step], next(iter(self._readings.values()))
            changes |= {name: (reading.prompts[name] - first.prompts[name]).tolist() for name in reading.prompts}
        found = None
        for name, values in changes.items():
            change = sum(values) / len(values)
            self.highest[name] = max(change, self.highest.get(name, change))
            bound, limit = self._stop.bound(values, themes, measurements), self._stop.limit(name)
            if found is None and step > 0 and not bound <= limit:
                found = name, change, bound, limit
        return found

    def _agreed(self, found: Found) -> Found:
        """Return what the first process found, so that all processes stop at the same step."""
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return found
        shared: list[Any] = [found]
        distributed.broadcast_object_list(shared, src=0)
        agreed: Found = shared[0]
        return agreed

    def _trained(self) -> list[tuple[str, torch.Tensor]]:
        """Return this process's part of each trainable parameter, sharing its memory."""
        named = self._trainer.model.named_parameters()
        return [(name, local_rows(one).detach()) for name, one in named if one.requires_grad]

    def _before_training(self) -> AbstractContextManager[Any]:
        """Return a context in which the model is the one before training.

        Raises:
            SettingsError: a resumed model cannot be undone.
        """
        model: Any = self._trainer.model
        configs = getattr(model, "peft_config", None)
        if not configs:
            raise SettingsError("stop: a full fine-tune cannot be resumed with it: the model before training is gone")
        for config in configs.values():
            start = str(getattr(config, "init_lora_weights", "")).lower()
            if start.startswith(BASE_CHANGING):
                raise SettingsError(
                    f"stop: cannot be resumed with init_lora_weights {start}, which changes the base model"
                )
        undone: AbstractContextManager[Any] = model.disable_adapter()
        return undone


def _still_falls(log: Sequence[dict[str, Any]]) -> bool:
    """Return whether the last held-out loss is below all others, or there are fewer than two."""
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return len(losses) < 2 or losses[-1] < min(losses[:-1])
