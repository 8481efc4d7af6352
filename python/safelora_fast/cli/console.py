"""Tables and warnings on the terminal. Warnings go to standard error, results to standard output."""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from safelora_fast.checkpoints.module_names import natural_order
from safelora_fast.files.output import abandoned, leftovers_note
from safelora_fast.printable import counted, one_line, printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from safelora_fast.projection.report import ModuleReport, ProjectionReport

# Width for files and pipes, which have none: wide enough for full names.
PIPE_WIDTH = 200
FIGURES_WIDTH = 56


class PlainConsole(Console):
    """A console that shows escape sequences in names (of files, tensors, judges) as plain text."""

    def render_str(self, text: str, **settings: Any) -> Text:
        """Return a text or a table cell without control characters."""
        return super().render_str(printable(text), **settings)


out = PlainConsole(
    highlight=False,
    markup=False,  # paths and names may contain brackets
    width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PIPE_WIDTH,
    soft_wrap=False,
)
err = PlainConsole(stderr=True, highlight=False)


def short(name: str, width: int = 40) -> str:
    """Shorten a module's name to its end, which says more than its beginning."""
    return name if len(name) <= width else "…" + name[1 - width :]


def figure(value: float) -> str:
    """Format a number with four significant digits, and NaN as a dash."""
    return "–" if math.isnan(value) else f"{value:.4g}"


def figure_table(first: str, *others: str | Text) -> Table:
    """Return an empty table with one column of names and columns of numbers."""
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in others:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def module_table(title: str, modules: Sequence[ModuleReport]) -> Table:
    """Return a table with one row per module."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("module", no_wrap=True)
    for column in ("cosine", "gain", "‖B‖", "‖V‖"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("projected")
    for module in modules:
        figures = (module.cosine, module.gain, module.b_norm, module.v_norm)
        unusual = f"no: {module.reason}" if math.isnan(module.cosine) else "no"
        table.add_row(
            short(module.name, max(16, out.width - FIGURES_WIDTH)),
            *map(figure, figures),
            "yes" if module.projected else unusual,
        )
    return table


def warn(message: str) -> None:
    """Print a warning as one line on standard error."""
    err.print(f"[yellow]warning:[/] {escape(one_line(message))}", soft_wrap=True)


def print_warnings(report: ProjectionReport) -> None:
    """Print the warnings of a report on standard error."""
    for warning in report.warnings:
        warn(warning)


def warn_of_abandoned(target: Path) -> None:
    """Warn about partial outputs that killed runs have left next to an output."""
    for warning in leftovers_note(abandoned(target)):
        warn(warning)


def print_module_tables(report: ProjectionReport, *, most: int | None) -> None:
    """Print one table per adapter: all modules in layer order or, with `most`, those whose update changed most."""
    for adapter in report.adapters:
        count = f"{adapter.adapter}: {len(adapter.projected)} of {len(adapter.modules)} modules selected ({report.selection})"
        modules = sorted(adapter.modules, key=lambda module: natural_order(module.name))
        if most is not None:
            change = {id(module): abs(module.update_norm - module.update_norm_after) for module in adapter.projected}
            modules = sorted(adapter.projected, key=lambda module: (-change[id(module)], module.name))[:most]
            if modules:
                count += "; most changed:"
        out.print(module_table(count, modules) if modules else count, soft_wrap=True)
        out.print(f"median ‖V‖/‖W_aligned‖: {figure(adapter.v_ratio)}", soft_wrap=True)
        if adapter.copied:
            out.print(
                f"copied through, not projected: {counted(len(adapter.copied), 'tensor')}, e.g. {adapter.copied[0]['tensor']}",
                soft_wrap=True,
            )
