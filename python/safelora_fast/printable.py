"""Make text from outside (file names, replies of endpoints) safe to print: no escape sequence reaches the terminal."""

from __future__ import annotations

# Joiners and direction marks. Some scripts need them, but Python does not consider them printable.
KEPT = "\u200c\u200d\u200e\u200f\u061c"


def printable(text: str) -> str:
    r"""Return the text with escapes such as \\x1b for control characters and lone surrogates."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in KEPT else letter.encode("unicode_escape").decode()
        for letter in text
    )


def without_controls(text: str) -> str:
    """Return the text with spaces for unprintable characters. On a page, an escape would look like part of a name."""
    return "".join(letter if letter.isprintable() or letter in KEPT else " " for letter in text)


def one_line(text: str) -> str:
    """Return the text in one printable line. Any white space becomes one space."""
    return printable(" ".join(text.split()))


def say(*lines: str) -> None:
    """Print lines on standard output, with escapes for unprintable characters."""
    for line in lines:
        print(printable(line), flush=True)


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: 1 tensor, 2 tensors."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
