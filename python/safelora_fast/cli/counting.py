"""Progress of work that is counted in things."""

from __future__ import annotations

import sys
import time

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from safelora_fast.cli.console import ByteProgress, err
from safelora_fast.printable import one_line


class CountProgress:
    """A bar with rate and time left; a line every ten seconds where standard error is no terminal.

    Args:
        wanted: show anything at all.
        brief: no line of work that is done before the first is due.
    """

    def __init__(self, *, wanted: bool = True, brief: bool = False) -> None:
        self._wanted = wanted
        self._brief = brief
        self._bar: Progress | None = None
        self._what = ""
        self._total = self._first = 0
        self._started = self._printed = 0.0

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Some work begins: so many things are to be done, of which so many are done already."""
        self.close()
        what = one_line(what)
        self._what, self._total, self._first = what, total, done
        self._started = self._printed = time.monotonic()
        if not self._wanted:
            return
        if err.is_terminal:
            columns = (
                TextColumn(escape(what)),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=err, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=done)
        elif done:
            print(f"{what}: {done} of {total} are there already", file=sys.stderr, flush=True)

    def advance(self, done: int) -> None:
        """So many are done."""
        if not self._wanted:
            return
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=f"{rate:.3g} a second")
            return
        due = now - self._printed >= ByteProgress.SECONDS_BETWEEN_LINES
        if due or (done == self._total and not (self._brief and self._printed == self._started)):
            self._printed = now
            left = (self._total - done) / max(rate, 1e-9)
            line = f"{self._what}: {done} of {self._total}, {rate:.3g} a second"
            print(line if done == self._total else f"{line}, {left:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> CountProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
