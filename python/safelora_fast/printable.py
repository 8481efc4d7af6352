"""Makes text from outside (file names, replies of endpoints) safe to print: no escape sequence reaches the terminal."""

from __future__ import annotations

# Joiners and marks of direction, which some scripts need, though Python does not call them printable.
KEPT = "\u200c\u200d\u200e\u200f\u061c"


def printable(text: str) -> str:
    r"""The text with escapes such as \\x1b for control characters and lone surrogates."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in KEPT else letter.encode("unicode_escape").decode()
        for letter in text
    )


def without_controls(text: str) -> str:
    """A text with spaces in place of what is not printable: for pages, where an escape would look like part of a name."""
    return "".join(letter if letter.isprintable() or letter in KEPT else " " for letter in text)


def one_line(text: str) -> str:
    """The text in one printable line: any white space becomes one space."""
    return printable(" ".join(text.split()))


def say(*lines: str) -> None:
    """Print lines on standard output, made printable."""
    for line in lines:
        print(printable(line), flush=True)


def counted(count: int, noun: str) -> str:
    """A number with its noun: 1 tensor, 2 tensors."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
