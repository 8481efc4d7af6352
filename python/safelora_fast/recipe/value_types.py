"""Whether a value from a YAML file is of the type that an annotation asks for, and what to call that type.

Annotations may be source text. A name in them that cannot be resolved without an import (a class of torch, of
transformers) stands for anything: whoever takes the value has the last word.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin


class _Unknown(type):
    """Attributes and subscripts of an unknown name are unknown too."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, _: object) -> type:
        return cls


class Unknown(metaclass=_Unknown):
    """A type that is not imported here."""


class _Names(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        return Unknown


KNOWN = {
    **{kind.__name__: kind for kind in (bool, int, float, str, list, dict, tuple)},
    **{name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Union", "List", "Dict", "Tuple")},
    "Mapping": Mapping,
    "Sequence": Sequence,
    "typing": typing,
}


def read_annotation(annotation: object, names: Mapping[str, Any] | None = None) -> Any:
    """The type that an annotation stands for.

    Args:
        annotation: a type, or its source text.
        names: what names in the text mean, beside the built-in types and those of `typing`.
    """
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, {"__builtins__": {}}, _Names({**KNOWN, **(names or {})}))  # noqa: S307
    except (TypeError, SyntaxError, AttributeError):
        return Unknown


def conforms(value: object, kind: Any) -> bool:
    """Whether a value is of a type; whole numbers are numbers, true and false are not."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Union or origin is types.UnionType:
        known = [one for one in inner if one is not Unknown]
        nothing_else = all(one is types.NoneType for one in known)  # only the unknown type could take the value
        return nothing_else or any(conforms(value, one) for one in known)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if kind in {int, float}:
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if (origin or kind) in {list, tuple, Sequence}:
        return isinstance(value, list) and (not inner or all(conforms(item, inner[0]) for item in value))
    if (origin or kind) in {dict, Mapping}:
        return isinstance(value, dict) and (not inner or all(conforms(item, inner[1]) for item in value.values()))
    return not (kind in {bool, str, types.NoneType} and not isinstance(value, kind))


def describe(kind: Any) -> str:
    """A type in words, for messages."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Union or origin is types.UnionType:
        words = [describe(one) for one in inner if one is not Unknown]
        return " or ".join(dict.fromkeys(words))
    if origin is Literal:
        return "one of " + ", ".join(str(one) for one in inner) if len(inner) > 1 else repr(inner[0])
    container = origin or kind
    if container in {list, tuple, Sequence}:
        return "a list of " + (describe(inner[0]) if inner else "values")
    if container in {dict, Mapping}:
        return "a mapping"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    return names.get(kind, "another type")
