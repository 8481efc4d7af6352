"""Progress by rows on standard error, with their rate."""

from __future__ import annotations

import sys
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from safelora_fast.cli.console import err

SECONDS_BETWEEN_LINES = 10.0


class RowProgress:
    """A bar with rows per second and time left; a line every ten seconds where standard error is no terminal.

    Args:
        wanted: show anything at all.
    """

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted
        self._bar: Progress | None = None
        self._first = 0
        self._started = self._printed = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Show how far it is; the first call counts what was done before."""
        now = time.monotonic()
        if not self._started:
            self._first, self._started, self._printed = done, now, now
            if self._wanted and err.is_terminal:
                columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
                self._bar = Progress(*columns, console=err, transient=True)
                self._bar.start()
                self._task = self._bar.add_task("", total=total, completed=done)
            return
        rate = (done - self._first) / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=f"{rate:.3g} rows/s")
        elif self._wanted and now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            left = (total - done) / max(rate, 1e-9)
            print(f"{done} of {total} rows at {rate:.3g} rows/s, {left:.0f} s left", file=sys.stderr, flush=True)

    def __enter__(self) -> RowProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
