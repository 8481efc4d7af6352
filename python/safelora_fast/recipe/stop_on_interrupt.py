"""Ctrl-C and the order to end: the step in hand is finished and kept, then the run stops."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from transformers import TrainerCallback

if TYPE_CHECKING:
    from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopper(TrainerCallback):  # type: ignore[misc]
    """A context in which the first signal stops the run after the optimiser step in hand, with a checkpoint of it.

    Stopping in the middle of a step would lose the steps since the last checkpoint, and would raise inside other
    libraries' native code. The second signal stops at once all the same. Several processes would not stop at the same step:
    there, and outside the main thread, signals do what they did before.
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
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
        """Ask for a checkpoint of this step; where the run makes none, stop."""
        if self._number is None:
            return
        if getattr(arguments.save_strategy, "value", arguments.save_strategy) == "no":
            self._stop()
        control.should_save = True

    def on_save(self, *_: Any, **__: Any) -> None:
        """Stop: callbacks before this one have sealed the checkpoint."""
        if self._number is not None:
            self._stop()
