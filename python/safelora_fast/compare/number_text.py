"""Figures of a comparison as text: the same digits in the terminal, in Markdown and on the page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeGuard

from safelora_fast.compare.report import PENDING
from safelora_fast.printable import KEPT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.compare.cell_sources import Origin
    from safelora_fast.compare.report import Cell, Column, SeedValue, SweepPoint

NOTHING = "–"
FAILED = "failed"
NOT_DONE = "not done yet"
INCOMPLETE = "This comparison is not complete: runs or measures that were asked for are missing."
DECIMALS = {"%": 1, "nats": 3, "s": 2, "GB": 2, "×": 2}
LEAST, MOST = 1e-4, 1e6  # sizes that are written without a power of ten
ARROWS = {"lower": "↓", "higher": "↑"}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def is_figure(value: float | None) -> TypeGuard[float]:
    """Whether there is a number to show."""
    return value is not None and math.isfinite(value)


def format_number(value: float | None, unit: str, *, at_least: int = 0) -> str:
    """The digits alone: as many decimals as the unit asks for, more where they would all be zeros; "–" without a number.

    Args:
        value: as the report has it: a share of 1 where the unit is "%".
        unit: of the column.
        at_least: decimals.
    """
    if not is_figure(value):
        return NOTHING
    shown = 100 * value if unit == "%" else value
    size = abs(shown)
    decimals = max(_decimals(size, unit), at_least)
    if size >= MOST or 0 < size < LEAST:
        mantissa, _, exponent = f"{size:.1e}".partition("e")
        text = f"{mantissa}·10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    elif unit not in DECIMALS and float(shown).is_integer():
        text = f"{size:.0f}"
    else:
        text = f"{size:.{decimals}f}"
    return f"−{text}" if shown < 0 else text


def format_ends(value: float, low: float, high: float, unit: str) -> tuple[str, str, str]:
    """The digits of a figure and of the ends of its interval: decimals for two digits of the figure, at least."""
    size = abs(100 * value if unit == "%" else value)
    at_least = _two_digits(size) if is_figure(value) and size >= LEAST else 0
    figure, least, most = (format_number(one, unit, at_least=at_least) for one in (value, low, high))
    return figure, least, most


def _decimals(size: float, unit: str) -> int:
    usual = DECIMALS.get(unit, 3)
    return _two_digits(size) if 0 < size < 10**-usual / 2 else usual


def _two_digits(size: float) -> int:
    return 1 - math.floor(math.log10(size))


def format_quantity(value: float | None, unit: str) -> str:
    """The digits with their unit: "12.5 %", "0.031 nats", "1.20×"."""
    digits = format_number(value, unit)
    if digits == NOTHING or not unit:
        return digits
    return f"{digits}{unit}" if unit == "×" else f"{digits} {unit}"


def format_interval(low: float | None, high: float | None, unit: str) -> str:
    """Both ends in brackets; nothing where one is missing."""
    if not (is_figure(low) and is_figure(high)):
        return ""
    return f"[{format_number(low, unit)}, {format_number(high, unit)}]"


def format_figure(cell: Cell | None, column: Column) -> str:
    """The figure of a cell alone.

    Where no run came to one: "failed" where any failed, else what is not done yet; "–" where nothing was measured.
    """
    if cell is None or not (cell.failures or is_figure(cell.value)):
        return NOTHING
    if is_figure(cell.value):
        return format_number(cell.value, column.unit)
    words = {format_run(seed, column) for seed in cell.failures}
    return FAILED if FAILED in words else words.pop() if len(words) == 1 else NOT_DONE


def format_cell(cell: Cell | None, column: Column) -> str:
    """A cell in one line, without the unit, which stands in the heading: "0.123 [0.101, 0.145] (2 of 3 runs)"."""
    parts = [format_figure(cell, column)]
    if cell is not None:
        runs = format_runs(cell)
        parts += [format_interval(cell.low, cell.high, column.unit), runs and f"({runs})"]
    return " ".join(part for part in parts if part)


def format_run(seed: SeedValue, column: Column) -> str:
    """What one run came to, with its unit; or "failed", or that it is not trained or measured yet."""
    if seed.failure is None:
        return format_quantity(seed.value, column.unit)
    return next((words for words in PENDING if seed.failure.endswith(words)), FAILED)


def format_runs(cell: Cell) -> str:
    """How many runs the figure is made of where it is not all: "2 of 3 runs", and "so far" where none failed."""
    missing = cell.failures
    if not 0 < len(missing) < len(cell.seeds):
        return ""
    more = " so far" if all(seed.pending for seed in missing) else ""
    return f"{len(cell.seeds) - len(missing)} of {len(cell.seeds)} runs{more}"


def format_incomplete(missing: Sequence[Origin]) -> str:
    """That a comparison is not complete, and how much of that failed and how much is not done yet."""
    pending = sum(one.pending for one in missing)
    counts = ((len(missing) - pending, FAILED), (pending, NOT_DONE))
    words = ", ".join(f"{count} {what}" for count, what in counts if count)
    return f"{INCOMPLETE} By run and reason: {words}." if words else INCOMPLETE


def format_heading(column: Column) -> str:
    """Title, unit and the good direction: "margin rise (nats) ↓"."""
    parts = (column.title, column.unit and f"({column.unit})", ARROWS.get(column.better or "", ""))
    return " ".join(part for part in parts if part)


def format_direction(column: Column) -> str:
    """The good direction in words; nothing where neither is."""
    return f"{column.better} is better" if column.better else ""


def format_projected(point: SweepPoint) -> str:
    """How many modules one threshold projects, of how many: a mean over seeds."""
    projected = f"{point.projected:.1f}".removesuffix(".0") if math.isfinite(point.projected) else NOTHING
    return f"{projected} of {point.modules}"


# Not those of safelora_fast.printable, whose escapes (\x1b, \u202e) tell a terminal's reader what a name hides: a report is read
# by others, to whom an escape would look like part of a name, and the pieces of a page keep the spaces around them.
def printable(text: str) -> str:
    """A text from outside with spaces for control characters and for what no file can hold."""
    return "".join(character if character.isprintable() or character in KEPT else " " for character in text)


def one_line(text: str) -> str:
    """A printable text in one line, without spaces around it."""
    return " ".join(printable(text).split())
