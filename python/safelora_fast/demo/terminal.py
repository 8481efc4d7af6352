"""What the demo shows while it works, and the libraries' own notices that it keeps away."""

from __future__ import annotations

import contextlib
import os
import warnings
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console


@contextlib.contextmanager
def bar(console: Console, title: str) -> Iterator[Callable[[int, int, float], None]]:
    """A bar with time left on a terminal, a line every tenth of the way elsewhere; called with (step, steps, loss)."""
    if not console.is_terminal:

        def line(step: int, steps: int, loss: float) -> None:
            if step == steps or step % max(1, steps // 10) == 0:
                console.print(f"   {title}: {step}/{steps}, loss {loss:.3f}")

        yield line
        return
    columns = (TextColumn("   {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title)

        def update(step: int, steps: int, loss: float) -> None:
            progress.update(task, completed=step, total=steps, description=f"{title}, loss {loss:.3f}")

        yield update


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' own bars and notices off the terminal; errors still pass."""
    disabled = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # tqdm looks at it when it is imported
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
        if disabled is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = disabled
