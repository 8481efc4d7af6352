"""What the command adds to the trainer: progress on the terminal, and a seal on every whole checkpoint."""

from __future__ import annotations

import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from safelora_fast.recipe.run_folder import RunFolder

SECONDS_BETWEEN_LINES = 10.0
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


class _Bar(Progress):
    """A bar with figures on lines of their own, which a narrow terminal wraps."""

    figures = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar, and below it the figures."""
        yield from super().get_renderables()
        if self.figures:
            yield Text(self.figures)


class Reporter(TrainerCallback):  # type: ignore[misc]
    """A context that shows a bar with rate and time left; lines where standard error is no terminal.

    Args:
        talk: show anything at all.
    """

    def __init__(self, *, talk: bool) -> None:
        self._talk = talk
        self._console = Console(stderr=True, highlight=False)
        self._bar: _Bar | None = None
        self._printed = self._started = time.monotonic()
        self._first_step = 0
        self._figures = ""

    def on_train_begin(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        """Show what there is to do."""
        self._started = self._printed = time.monotonic()
        self._first_step = state.global_step
        if self._talk and state.is_world_process_zero and self._console.is_terminal:
            columns = (
                TextColumn("step"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = _Bar(*columns, console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_log(self, _arguments: Any, _state: Any, _control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Remember the latest figures."""
        if logs and "loss" in logs:
            shown = {"loss": logs["loss"]}
            shown.update(
                (name.removeprefix("defense/"), value)
                for name, value in logs.items()
                if name.startswith(("defense/", "monitor/")) and name != "defense/time_share"
            )
            self._figures = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
            if self._bar is not None:
                self._bar.figures = self._figures
                self._bar.refresh()

    def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        """Show how far the run is."""
        if not (self._talk and state.is_world_process_zero):
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)
            return
        now = time.monotonic()
        last = state.global_step >= state.max_steps
        if last or now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            rate = (state.global_step - self._first_step) / max(now - self._started, 1e-9)
            left = (state.max_steps - state.global_step) / rate
            line = f"step {state.global_step} of {state.max_steps}, {1 / rate:.2f} s a step, {left:.0f} s left"
            print(f"{line}: {self._figures}" if self._figures else line, file=sys.stderr, flush=True)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
