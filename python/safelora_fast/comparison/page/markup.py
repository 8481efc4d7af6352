"""HTML and SVG by construction: whatever is no markup already is escaped where it is put in."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from safelora_fast.comparison.figures_text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

VOID = {"br", "meta"}


class Markup(str):
    """Text that is markup, and is not escaped again."""

    __slots__ = ()


def element(name: str, /, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """One element with what it holds.

    Args:
        name: of the element.
        children: :class:`Markup` as it is, other text escaped; None is left out.
        attributes: `class_` for class, underscores for hyphens; None and False are left out, True has no value, and floats
            are rounded to a tenth, which is enough for a coordinate.
    """
    pairs = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Markup(f"<{name}{pairs}>")
    return Markup(f"<{name}{pairs}>{join(children)}</{name}>")


def join(parts: Iterable[str | None], between: str = "") -> Markup:
    """Parts one after the other, escaped as :func:`element` does."""
    return Markup(escaped(between).join(escaped(part) for part in parts if part is not None))


def foreign(text: str) -> Markup:
    """A name or another text from outside, which may be long, or run from right to left."""
    return element("bdi", text)


def escaped(text: str) -> Markup:
    """Text as markup."""
    return text if isinstance(text, Markup) else Markup(html.escape(printable(text)))


def number(value: float) -> str:
    """A coordinate."""
    return f"{round(value, 1) + 0.0:g}"  # no minus before a zero


def _attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{escaped(value) if isinstance(value, str) else number(value)}"'
