"""What a call from Python shows by itself: a bar where standard error is a terminal, and a report's warnings through logging.

The commands show both in their own way.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

reports = logging.getLogger("safelora_fast.reports")
Given = TypeVar("Given")


class TerminalBar:
    """A bar of rich's on standard error for whatever counts what is done: bytes, answers or rows."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task: Any = None

    def start(self, *facts: Any) -> None:
        """Some work begins: (total bytes, modules), or (what, total) and how much of it is done already."""
        whole = facts[0] if isinstance(facts[0], int) else facts[1]
        done = facts[2] if len(facts) > 2 else 0
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._bar.start()
        self._task = self._bar.add_task("" if isinstance(facts[0], int) else str(facts[0]), total=whole, completed=done)

    def advance(self, done: int, *what: str) -> None:
        """So much is done; `what` was the latest."""
        self._bar.update(self._task, completed=done, description=what[0] if what else None)

    def __call__(self, done: int, total: int) -> None:
        """So much is done, of so much."""
        if self._task is None:
            self.start("", total, done)
        self.advance(done)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


@contextlib.contextmanager
def bar_on_a_terminal(progress: Given | bool | None) -> Iterator[Given | Any | None]:
    """What a call tells its progress to: what was given; None makes a bar where there is a terminal, True anywhere, False none."""
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield None
        return
    if progress is not None and progress is not True:
        yield progress
        return
    with contextlib.closing(TerminalBar()) as bar:
        yield bar


def log_warnings(warnings: Iterable[str]) -> None:
    """Log what a report warns of, for callers who do not look at it."""
    for warning in warnings:
        reports.warning("%s", warning)
