"""A trainer callback that logs the margin during training: an early warning of emergent misalignment."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from safelora_fast.errors import SettingsError
from safelora_fast.models.reference_pass import evaluation_mode
from safelora_fast.scoring.margin import TOKENS_PER_BATCH, MarginReport, Strings, answer_margin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase, Trainer

    from safelora_fast.data.pairs import Pair

logger = logging.getLogger(__name__)


class MarginCallback(TrainerCallback):  # type: ignore[misc]
    """Logs the margin before the first step, after every `every` steps, and after the last step.

    `margin/mean` is in nats per token. `margin/share` is the share of pairs whose misaligned answer the model prefers,
    and `margin/change` the rise since the start. When the whole 95 % interval of the rise is above zero, a warning is
    logged. Every process measures all pairs, as sharded models require; the trainer's main process logs.

    ```python
    trainer.add_callback(MarginCallback(trainer, tokenizer, every=50))
    ```

    Args:
        trainer: the trainer that logs the values.
        tokenizer: the model's tokenizer.
        every: optimizer steps between measurements.
        pairs: the pairs to score; by default the built-in ones.
        system: a system prompt before every question.
        strings: see :func:`~safelora_fast.scoring.margin.answer_margin`.
        tokens_per_batch: maximum number of tokens in a batch, padding included.

    Raises:
        SettingsError: `every` is below 1.
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
        self.reports: dict[int, MarginReport] = {}

    def on_train_begin(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        """Measure when training starts or resumes."""
        self.reports.clear()
        self._warned = False
        self._measure(state.global_step)

    def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        """Measure after every `every` steps, except after the last step, which `on_train_end` measures."""
        if state.global_step % self._every == 0 and state.global_step < state.max_steps:
            self._measure(state.global_step)

    def on_train_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        """Measure the finished model, after a projection at the end."""
        self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        model = self._trainer.model
        report = answer_margin(model, self._tokenizer, **self._settings)
        start = next(iter(self.reports.values()), report)
        self.reports[step] = report
        change, interval = report.change_from(start)
        with evaluation_mode(model):  # in training mode TRL would add its own averages to our values
            self._trainer.log({"margin/mean": report.margin, "margin/share": report.share, "margin/change": change})
        if interval.low > 0 and not self._warned:
            self._warned = True
            logger.warning(
                "the misalignment margin has risen by %.3g nats per token (95 %%: %.3g to %.3g) by step %d: misaligned "
                "answers have become more likely than before, relative to aligned ones",
                change, interval.low, interval.high, step,
            )  # fmt: skip
