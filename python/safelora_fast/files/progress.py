"""The progress bar of all commands and calls, and the logger for the warnings of reports.

A call from Python shows a bar if standard error is a terminal, and logs the warnings of its report. Commands print the
warnings themselves.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from typing import TYPE_CHECKING, Any, TypeVar

from safelora_fast.printable import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SECONDS_BETWEEN_LINES = 10.0
NAME_WIDTH = 40
reports = logging.getLogger("safelora_fast.reports")
Given = TypeVar("Given")


class ProgressBar:
    """A bar on standard error with rate and time left. Without a terminal, it prints a line every ten seconds.

    For bytes, call `start(total_bytes, modules)` and `advance(done_bytes, module)`.
    For items, call `start(what, total, done)` and `advance(done)`.
    The bar is also a function of (done, total), for code that reports progress through a function.

    Args:
        wanted: False shows nothing.
        brief: omit the last line of work that takes less than ten seconds.
    """

    def __init__(self, *, wanted: bool = True, brief: bool = False) -> None:
        self._note = ""
        self._wanted = wanted
        self._brief = brief
        self._bar: Any = None
        self._started: float | None = None

    def start(self, *work: Any) -> None:
        """Begin with (total bytes, modules), or with (what, total) and the number of items that are done already."""
        self.close()
        self._in_bytes = isinstance(work[0], int)
        self._what, self._total = (f"{work[1]} modules", work[0]) if self._in_bytes else (one_line(work[0]), work[1])
        self._first = work[2] if len(work) > 2 else 0
        self._started = self._printed = time.monotonic()
        if not self._wanted:
            return
        self._bar = _rich_bar(in_bytes=self._in_bytes)
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task(self._what, total=self._total, completed=self._first, rate="", note=self._note)
        elif self._first:
            print(f"{self._what}: {self._first} of {self._total} are there already", file=sys.stderr, flush=True)

    def advance(self, done: int, module: str | None = None) -> None:
        """Report the total that is done so far; `module` was the latest."""
        if not self._wanted or self._started is None:
            return
        if module is not None:
            self._what = one_line(module)
        now = time.monotonic()
        each = max(now - self._started, 1e-9) / max(done - self._first, 1)
        if done == self._first:
            rate = ""
        elif self._in_bytes:
            rate = f"{1e-9 / each:.2f} GB/s"
        else:
            rate = f"{1 / each:.3g} a second" if each < 1 else f"{each:.3g} s each"
        if self._bar is not None:
            name = self._what if len(self._what) <= NAME_WIDTH else f"…{self._what[1 - NAME_WIDTH :]}"
            self._bar.update(self._bar.task_ids[0], completed=done, description=name, rate=rate)
            return
        is_due = now - self._printed >= SECONDS_BETWEEN_LINES
        at_the_end = done == self._total and not self._in_bytes and not (self._brief and self._printed == self._started)
        if is_due or at_the_end:
            self._printed = now
            share = f"{done / max(self._total, 1):.0%}" if self._in_bytes else f"{done} of {self._total}"
            left = "" if done == self._total else f", {(self._total - done) * each:.0f} s left"
            note = f": {self._note}" if self._note else ""
            print(f"{self._what}: {share}, {rate}{left}{note}", file=sys.stderr, flush=True)

    def annotate(self, note: str) -> None:
        """Show a text below the bar, or at the end of each line."""
        self._note = note
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], note=note, refresh=True)

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of `total` items are done. The first call sets the number that was done before."""
        if self._started is None:
            self.start("rows", total, done)
        self.advance(done)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _rich_bar(*, in_bytes: bool) -> Any:
    """Return a rich progress bar with the task's note below it; None if standard error is not a terminal."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Bar(Progress):
        def get_renderables(self) -> Iterator[Any]:
            yield from super().get_renderables()
            yield from (Text(task.fields["note"]) for task in self.tasks if task.fields["note"])

    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
    )


@contextlib.contextmanager
def bar_on_a_terminal(progress: Given | bool | None) -> Iterator[Given | Any | None]:
    """Yield the object that a call reports its progress to.

    Args:
        progress: the caller's argument. None means a bar if standard error is a terminal, True means a bar or lines
            anywhere, False means nothing.
    """
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield None
    elif progress is None or progress is True:
        with ProgressBar() as bar:
            yield bar
    else:
        yield progress


def log_warnings(warnings: Iterable[str]) -> None:
    """Log the warnings of a report, for callers who do not inspect it."""
    for warning in warnings:
        log_warning(warning)


def log_warning(warning: str) -> None:
    """Log one warning."""
    reports.warning("%s", warning)
