"""Number formats and template environments that the page, Markdown and the terminal share."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

if TYPE_CHECKING:
    from collections.abc import Callable

    from jinja2 import Environment

NOTHING = "–"
DECIMALS = {"%": 1, "nats": 3, "s": 2, "GB": 2, "×": 2}
LEAST, MOST = 1e-4, 1e6  # absolute values in this range are written without a power of ten
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def is_value(value: float | None) -> TypeGuard[float]:
    """Return whether there is a finite number to show."""
    return value is not None and math.isfinite(value)


def format_number(value: float | None, unit: str, *, at_least: int = 0) -> str:
    """Format a number without its unit; "–" if there is none.

    The unit sets the number of decimals; more are used if all of them would be zeros.

    Args:
        value: value in the report; a share of 1 if the unit is "%".
        unit: unit of the column.
        at_least: minimum number of decimals.
    """
    if not is_value(value):
        return NOTHING
    shown = 100 * value if unit == "%" else value
    size = abs(shown)
    if size >= MOST or 0 < size < LEAST:
        mantissa, _, exponent = f"{size:.1e}".partition("e")
        text = f"{mantissa}·10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    elif unit not in DECIMALS and float(shown).is_integer():
        text = f"{size:.0f}"
    else:
        usual = DECIMALS.get(unit, 3)
        decimals = _two_digits(size) if 0 < size < 10**-usual / 2 else usual
        text = f"{size:.{max(decimals, at_least)}f}"
    return f"−{text}" if shown < 0 else text


def format_ends(value: float, low: float, high: float, unit: str) -> tuple[str, str, str]:
    """Format a value and the ends of its interval, with enough decimals for two digits of the value."""
    size = abs(100 * value if unit == "%" else value)
    at_least = _two_digits(size) if is_value(value) and size >= LEAST else 0
    shown, least, most = (format_number(one, unit, at_least=at_least) for one in (value, low, high))
    return shown, least, most


def _two_digits(size: float) -> int:
    return 1 - math.floor(math.log10(size))


def format_quantity(value: float | None, unit: str) -> str:
    """Format a number with its unit: "12.5 %", "0.031 nats", "1.20×"."""
    digits = format_number(value, unit)
    if digits == NOTHING or not unit:
        return digits
    return f"{digits}{unit}" if unit == "×" else f"{digits} {unit}"


def format_interval(low: float | None, high: float | None, unit: str) -> str:
    """Format both ends in brackets; "" if one is missing."""
    if not (is_value(low) and is_value(high)):
        return ""
    return f"[{format_number(low, unit)}, {format_number(high, unit)}]"


@cache
def environment(kind: Literal["html", "markdown", "text"], finalize: Callable[[Any], Any] | None = None) -> Environment:
    """Return the environment for the templates of one kind.

    Args:
        kind: only "html" escapes text automatically.
        finalize: escapes every inserted text.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("safelora_fast.compare", "templates"),
        autoescape=kind == "html",  # noqa: S701 - Markdown is escaped by `finalize`, and plain text needs no escape
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": format_number, "quantity": format_quantity, "interval": format_interval}
    made.tests["value"] = is_value
    return made


def words() -> Any:
    """Return the macros of words.j2, as functions that return plain text."""
    return environment("text").get_template("words.j2").module
