"""Parses an HTML page into a tree, without a browser."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

VOID = {"br", "meta"}


@dataclass
class Node:
    """An element.

    Attributes:
        name: tag name.
        attributes: values by name; "" for attributes without a value.
        children: elements and texts.
    """

    name: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)

    def all(self, name: str | None = None, **attributes: str) -> Iterator[Node]:
        """Yield every descendant with this name and these attributes; `class_` matches one of its classes."""
        for child in self.children:
            if isinstance(child, Node):
                if name in {None, child.name} and all(child.has(*pair) for pair in attributes.items()):
                    yield child
                yield from child.all(name, **attributes)

    def has(self, attribute: str, value: str) -> bool:
        if attribute == "class_":
            return value in self.attributes.get("class", "").split()
        return self.attributes.get(attribute.replace("_", "-")) == value

    def one(self, name: str | None = None, **attributes: str) -> Node:
        [found] = self.all(name, **attributes)
        return found

    @property
    def text(self) -> str:
        """All text inside, with its white space unchanged."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("")
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute of <{tag}> comes twice"
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].name == tag, f"</{tag}> closes <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read_page(page: str) -> Node:
    """Parse a page, and check that all its elements are closed in order."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == [reader.root], f"<{reader.open[-1].name}> is not closed"
    return reader.root
