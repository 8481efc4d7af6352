"""The one reader of YAML files: scalars of YAML 1.2, plain values, the line of every key, and limits.

An alias stands for the whole content of its anchor, so a few lines can expand to billions of values. The limits
therefore count values with every alias expanded, while the file is read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import yaml

from safelora_fast.errors import SafeLoraFastError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

Keys: TypeAlias = "tuple[str, ...]"
MOST_CHARACTERS = 1 << 22
MOST_NODES = 100_000
MOST_DEPTH = 50
BOOL = "tag:yaml.org,2002:bool"
MERGE = "tag:yaml.org,2002:merge"
TRUTH = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$")
PLAIN = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """SafeLoader with the scalars of YAML 1.2: 1e-4 is a number, and `save_strategy: no` is text.

    PyYAML reads YAML 1.1, where the first is text and the second is false.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, Any]]]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node and everything in it. Nodes beyond the limits are rejected before they are read."""
        self.nodes += 1
        self.depth += 1
        mark = self.peek_event().start_mark
        if self.depth > MOST_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested in more than {MOST_DEPTH} levels", mark)
        if self.nodes > MOST_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_NODES:,} values", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver(BOOL, TRUTH, list("tTfF"))


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """SafeDumper that quotes text which _Loader would read as another type."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def dump_yaml(values: dict[str, Any]) -> str:
    """Return YAML that :func:`parse_yaml` reads as these values, in their order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def parse_yaml(
    text: str,
    source: str,
    lines: dict[Keys, int] | None = None,
    *,
    has_lines: bool = True,
    error: type[SafeLoraFastError] = SettingsError,
) -> Any:
    """Return the plain values of a YAML text.

    Args:
        text: the YAML.
        source: the origin of the text, for messages.
        lines: filled with the line of every key, by the keys that lead to it.
        has_lines: whether messages name the line.
        error: the error class to raise.

    Raises:
        SafeLoraFastError: an `error`: the text is not YAML, repeats a key, or exceeds the limits on size or depth.
    """
    if len(text) > MOST_CHARACTERS:
        raise error(f"{source}: has more than {MOST_CHARACTERS:,} characters")
    loader: Any = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _Reading(loader, {} if lines is None else lines).value(node, (), ())
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark
        where = source if mark is None or not has_lines else f"{source}:{mark.line + 1}"
        raise error(f"{where}: this is not YAML: {problem.problem}") from problem
    except yaml.YAMLError as problem:
        raise error(f"{source}: this is not YAML: {problem}") from problem
    except _RefusedError as refused:
        where = f"{source}:{refused.line}" if has_lines else source
        raise error(f"{where}: {refused}") from None
    except (ValueError, OverflowError) as problem:  # a date that does not exist
        raise error(f"{source}: {problem}") from problem
    finally:
        if loader is not None:
            loader.dispose()


class _RefusedError(Exception):
    """Valid YAML that is not accepted here."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


class _Reading:
    """Converts nodes, which aliases share, to values."""

    def __init__(self, loader: Any, lines: dict[Keys, int]) -> None:
        self._loader = loader
        self._lines = lines
        self._made = 0
        self._top = 0  # line of the current top-level key, because an alias's node has the line of its anchor

    def value(self, node: Any, keys: Keys, above: tuple[int, ...]) -> Any:
        if id(node) in above:
            raise _RefusedError(_line(node), "an alias contains itself")
        if not isinstance(node, yaml.ScalarNode) and node.tag not in PLAIN:
            raise _RefusedError(_line(node), f"{node.tag}: only plain mappings and lists are read")
        self._made += 1
        if self._made > MOST_NODES:
            raise _RefusedError(
                self._top or _line(node), f"more than {MOST_NODES:,} values, with every alias written out"
            )
        above = (*above, id(node))
        if len(above) > MOST_DEPTH:
            raise _RefusedError(
                self._top or _line(node), f"nested in more than {MOST_DEPTH} levels, with every alias written out"
            )
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, keys, above) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, keys, above)
        return self._loader.construct_object(node)

    def _mapping(self, node: Any, keys: Keys, above: tuple[int, ...]) -> dict[str, Any]:
        """Return a mapping. Its own keys win over those merged by `<<: *others`; among merged keys, the first wins."""
        self._check_keys(node, keys)
        result: dict[str, Any] = {}
        for key, item in node.value:
            if key.tag == MERGE:
                self._top = self._top if keys else _line(key)
                for other in reversed(list(_merged(item))):
                    result.update(self.value(other, keys, above))
        for key, item in node.value:
            if key.tag != MERGE:
                inner = (*keys, str(key.value))
                self._lines[inner] = _line(key)
                self._top = self._top if keys else _line(key)
                result[inner[-1]] = self.value(item, inner, above)
        return result

    def _check_keys(self, node: Any, keys: Keys) -> None:
        given: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _RefusedError(_line(key), "keys must be plain words")
            if key.value in given:
                raise _RefusedError(
                    _line(key), f"{'.'.join((*keys, key.value))}: given twice, also on line {given[key.value]}"
                )
            given[key.value] = _line(key)


def _line(node: Any) -> int:
    line: int = node.start_mark.line + 1
    return line


def _merged(node: Any) -> Iterator[Any]:
    for other in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if not isinstance(other, yaml.MappingNode):
            raise _RefusedError(_line(other), "<<: takes a mapping, or a list of mappings")
        yield other
