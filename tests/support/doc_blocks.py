"""The fenced blocks of a Markdown page, with the output that follows a block and the comment that marks it."""

from __future__ import annotations

import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```\n", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d+\.\d+")
MARK = re.compile(r"<!-- (not run|run by): ([^>]+) -->\s*\Z")


@dataclass
class Block:
    """A fenced block.

    Attributes:
        page: the page, relative to the repository.
        line: the number of the fence's line.
        language: the word behind the fence; "" is output, "text" a picture made of characters.
        text: the content, without the indent of the fence.
        mark: "not run" with the reason, or "run by" with the test that runs it; None for most blocks.
        output: the text of the block of output that follows this one directly, or None.
    """

    page: str
    line: int
    language: str
    text: str
    mark: tuple[str, str] | None
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in order; a block without a language belongs to the code right before it."""
    source = page.read_text("utf-8")
    found: list[Block] = []
    end = 0
    for fence in FENCE.finditer(source):
        before = source[end : fence.start()]
        text = textwrap.dedent(fence["text"])
        if not fence["language"] and not before.strip() and found and found[-1].output is None:
            found[-1].output = text
        else:
            mark = MARK.search(before)
            number = source[: fence.start()].count("\n") + 1
            name = str(page.relative_to(ROOT))
            found.append(Block(name, number, fence["language"], text, (mark[1], mark[2]) if mark else None))
        end = fence.end()
    return found


def same_output(expected: str, shown: str) -> bool:
    """Compare outputs: `…` is any text, numbers with decimals are equal to 1 %, and spaces at ends of lines are ignored."""
    expected, shown = ("\n".join(line.rstrip() for line in text.strip().split("\n")) for text in (expected, shown))
    words = NUMBER.split(expected)
    found = re.search(
        f"({NUMBER.pattern})".join(re.escape(word).replace("…", ".*?") for word in words), shown, re.DOTALL
    )
    if found is None:
        return False
    pairs = zip(NUMBER.findall(expected), found.groups(), strict=True)
    return all(math.isclose(float(left), float(right), rel_tol=0.01) for left, right in pairs)
