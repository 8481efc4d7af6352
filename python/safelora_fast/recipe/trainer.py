"""The trainer of the train command and its callbacks for checkpoints, timing, progress, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import statistics
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn

from transformers import TrainerCallback

from safelora_fast.data.schedule import EpochSampler
from safelora_fast.files.progress import ProgressBar
from safelora_fast.trainers.trl import DefendedSFTTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

    from safelora_fast.data.schedule import Epochs
    from safelora_fast.recipe.run_folder import RunFolder

WARM_UP = 5
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RecipeTrainer(DefendedSFTTrainer):
    """A DefendedSFTTrainer that can use different examples in each epoch, and that stops exactly at the last step.

    Without this, a run that is resumed after its last step, in the middle of an epoch, would train that epoch again.

    Args:
        epochs: examples of each epoch, as indices into the training data; None uses all examples in each epoch.
    """

    def __init__(self, *args: Any, epochs: Epochs | None = None, **kwargs: Any) -> None:
        self._epochs = epochs
        super().__init__(*args, **kwargs)

    def tell_of_checkpoints(self) -> None:
        """Do nothing: the recipe's folder contains the projected adapter, and its card says so."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self._epochs is None:
            return super()._get_train_sampler(*args, **kwargs)
        return EpochSampler(self._epochs, lambda: int(self.state.epoch or 0))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any, **kwargs: Any
    ) -> tuple[list[Any], Any]:
        """Return the micro-batches of one optimizer step; none after the last step."""
        if self.state.global_step >= self.state.max_steps > 0:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)


class Timekeeper(TrainerCallback):  # type: ignore[misc]
    """Measures training time, and seals each checkpoint after the trainer has written it.

    Args:
        folder: the run's output folder.
        before: seconds of training before this session.
    """

    def __init__(self, folder: RunFolder, before: float) -> None:
        self._folder = folder
        self._before = before
        self._began = self._started = time.perf_counter()
        self._steps: list[float] = []

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all sessions."""
        return self._before + time.perf_counter() - self._started

    @property
    def step_seconds(self) -> float | None:
        """Median seconds per step in this session, without the first few warm-up steps; None before the first step."""
        return statistics.median(self._steps[WARM_UP:] or self._steps) if self._steps else None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Record the start time of a step."""
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Record the duration of a step."""
        self._steps.append(time.perf_counter() - self._began)

    def on_save(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        """Seal the checkpoint of this step."""
        if state.is_world_process_zero:
            self._folder.seal(state.global_step, self.seconds)


class Reporter(TrainerCallback):  # type: ignore[misc]
    """A context manager that shows a progress bar with the latest metrics.

    Args:
        talk: whether to show the bar.
    """

    def __init__(self, *, talk: bool) -> None:
        self._talk = talk
        self._bar = ProgressBar(wanted=talk)

    def on_train_begin(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        """Start the bar."""
        self._bar = ProgressBar(wanted=self._talk and state.is_world_process_zero)
        self._bar.start("steps", state.max_steps, state.global_step)

    def on_log(self, _arguments: Any, _state: Any, _control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Show the latest metrics."""
        if logs and "loss" in logs:
            shown = {"loss": logs["loss"]}
            for name, value in logs.items():
                if name.startswith(("defense/", "monitor/")) and name != "defense/time_share":
                    shown[name.removeprefix("defense/")] = value
            self._bar.annotate(", ".join(f"{name} {value:.4g}" for name, value in shown.items()))

    def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        """Advance the bar."""
        self._bar.advance(state.global_step)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


class Stopper(TrainerCallback):  # type: ignore[misc]
    """A context manager in which the first SIGINT or SIGTERM saves a checkpoint after the current step, then stops.

    An exception in the middle of a step would lose the steps since the last checkpoint, and would unwind through native code
    of other libraries. A second signal stops the run immediately. With several processes, which would not stop at the
    same step, and outside the main thread, the previous signal handlers stay in place.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopper:
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if alone and threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}
        if kind is None and self._number is not None:
            self._stop()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._number is not None:
            self._stop()
        self._number = number
        if number == signal.SIGINT:
            print("stopping after this step; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)

    def _stop(self) -> NoReturn:
        if self._number == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def on_step_end(self, arguments: Any, _state: Any, control: Any, **_: Any) -> None:
        """Request a checkpoint of this step; stop immediately if the run saves no checkpoints."""
        if self._number is None:
            return
        if getattr(arguments.save_strategy, "value", arguments.save_strategy) == "no":
            self._stop()
        control.should_save = True

    def on_save(self, *_: Any, **__: Any) -> None:
        """Stop the run; the :class:`Timekeeper`, an earlier callback, has already sealed the checkpoint."""
        if self._number is not None:
            self._stop()
