"""What the command adds to the trainer: progress on the terminal, and a seal on every whole checkpoint."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from safelora_fast.files.progress import ProgressBar

if TYPE_CHECKING:
    from safelora_fast.recipe.run_folder import RunFolder

WARM_UP = 5


class Sealer(TrainerCallback):  # type: ignore[misc]
    """Marks checkpoints as whole once the trainer has written them.

    Args:
        folder: the run's.
        before: seconds of training before this session.
    """

    def __init__(self, folder: RunFolder, before: float) -> None:
        self._folder = folder
        self._before = before
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training until now, over all sessions."""
        return self._before + time.perf_counter() - self._started

    def on_save(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        """Seal the checkpoint of this step."""
        if state.is_world_process_zero:
            self._folder.seal(state.global_step, self.seconds)


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Times the optimiser steps of this session."""

    def __init__(self) -> None:
        self._began = 0.0
        self._steps: list[float] = []

    @property
    def median(self) -> float | None:
        """Seconds of a step: the median after the first few, which warm up; None without steps."""
        return statistics.median(self._steps[WARM_UP:] or self._steps) if self._steps else None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step is done."""
        self._steps.append(time.perf_counter() - self._began)


class Reporter(TrainerCallback):  # type: ignore[misc]
    """A context that shows a progress bar with the latest metrics.

    Args:
        talk: show anything at all.
    """

    def __init__(self, *, talk: bool) -> None:
        self._talk = talk
        self._bar = ProgressBar(wanted=talk)

    def on_train_begin(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        """Show what there is to do."""
        self._bar = ProgressBar(wanted=self._talk and state.is_world_process_zero)
        self._bar.start("steps", state.max_steps, state.global_step)

    def on_log(self, _arguments: Any, _state: Any, _control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Show the latest metrics."""
        if logs and "loss" in logs:
            shown = {"loss": logs["loss"]}
            shown.update(
                (name.removeprefix("defense/"), value)
                for name, value in logs.items()
                if name.startswith(("defense/", "monitor/")) and name != "defense/time_share"
            )
            self._bar.annotate(", ".join(f"{name} {value:.4g}" for name, value in shown.items()))

    def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        """Show how far the run is."""
        self._bar.advance(state.global_step)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
