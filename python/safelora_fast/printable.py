"""Text from outside, e.g. names of files and what endpoints say, made safe to print: no escape sequence acts on a terminal."""

from __future__ import annotations

# Not printable as Python sees it, but part of how some scripts are written: joiners and marks of direction.
KEPT = "\u200c\u200d\u200e\u200f\u061c"


def printable(text: str) -> str:
    r"""A text with an escape such as \\x1b in the place of what is not printable: control characters, lone surrogates."""
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
    """A printable text in one line: white space, line ends too, becomes single spaces."""
    return printable(" ".join(text.split()))


def say(*lines: str) -> None:
    """Print lines on standard output, each of them printable and one line."""
    for line in lines:
        print(printable(line), flush=True)


def counted(count: int, noun: str) -> str:
    """A number of things, in words: 1 tensor, 2 tensors."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
