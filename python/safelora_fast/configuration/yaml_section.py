"""Schemas for sections of a YAML file, checked by pydantic; errors name the file, line and key."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from safelora_fast.configuration.signatures import read_annotation

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from pydantic_core import ErrorDetails

    from safelora_fast.configuration.yaml_document import Document
    from safelora_fast.errors import SettingsError
    from safelora_fast.files.yaml_reader import Keys

Read = TypeVar("Read")
Checked = TypeVar("Checked", bound="Arguments")
# The description of a valid value by pydantic error type; other errors use pydantic's message.
MUST_BE = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "is_instance_of": "a list",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_type": "a section with settings of its own",
    "none_required": "null",
    "string_type": "text",
    "value_error": "{error}",
}


class Arguments(BaseModel):
    """Base class of schemas: only known keys, strictly typed values. A float field accepts integers, not booleans."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, given: Any) -> Any:
        """Report an unknown key before other errors: a misspelled key often also counts as a missing one."""
        for key in given if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                raise PydanticCustomError("unknown", "unknown", {"key": key, "known": list(cls.model_fields)})
        return given


class Section(Arguments):
    """A section whose keys this package defines; empty strings are invalid."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_empty_text(cls, value: Any) -> Any:
        if value == "":
            raise PydanticCustomError("empty", "is empty")
        return value


def section_of(
    function: Callable[..., Any], *, types: Mapping[str, Any] | None = None, but: Collection[str] = ()
) -> type[Section]:
    """Create the schema whose keys are the arguments of a function or class.

    Args:
        function: the function or class; its annotations define the types.
        types: types of arguments whose form in YAML differs from Python.
        but: arguments to leave out.
    """
    names = {**vars(sys.modules[function.__module__]), "Path": str}
    fields: dict[str, Any] = {}
    for name, argument in inspect.signature(function).parameters.items():
        if name not in but:
            kind = (types or {}).get(name) or read_annotation(argument.annotation, names)
            fields[name] = (kind, ... if argument.default is argument.empty else argument.default)
    return create_model(function.__name__, __base__=Section, **fields)


def read_section(document: Document, keys: Keys, kind: type[Read]) -> Read:
    """Read and check the section at a key path; an absent section gets the defaults.

    Args:
        document: the file.
        keys: the path of the section.
        kind: a :class:`Section`, or a class whose arguments are the keys.

    Raises:
        SettingsError: with the file, the line and the dotted key.
    """
    if issubclass(kind, Section):
        return cast("Read", check(document, keys, kind, document.section(*keys)))
    return kind(**dict(check(document, keys, section_of(kind), document.section(*keys))))


def check(document: Document, keys: Keys, section: type[Checked], given: Mapping[str, Any]) -> Checked:
    """Check values against a schema.

    Raises:
        SettingsError: a value is invalid; the message names the first such key.
    """
    try:
        return section.model_validate(given)
    except ValidationError as error:
        raise refusal(document, keys, given, error) from None


def refusal(document: Document, keys: Keys, given: Any, error: ValidationError) -> SettingsError:
    """Return the error for the first key that pydantic rejected; a union type yields one pydantic error per member."""
    by_path: dict[Keys, list[ErrorDetails]] = {}
    for reason in error.errors(include_url=False):
        by_path.setdefault(_path(reason, given), []).append(reason)
    first = next(iter(by_path))
    path = max((path for path in by_path if path[: len(first)] == first), key=len)
    # The error at the deepest list index belongs to the union member that the user meant.
    depth = max(map(_depth, by_path[path]))
    reasons = [reason for reason in by_path[path] if _depth(reason) == depth]
    reason, where = reasons[0], (*keys, *path)
    if reason["type"] == "unknown":
        return document.unknown(where, reason["ctx"]["known"])
    if reason["type"] == "missing":
        return document.problem(where, "missing")
    if "too_short" in reason["type"]:
        return document.problem(where, "is empty")
    for other in reasons:
        if other["type"] not in MUST_BE:
            return document.problem(where, other["msg"])
    must_be = dict.fromkeys(MUST_BE[reason["type"]].format(**reason.get("ctx", {})) for reason in reasons)
    return document.problem(where, f"must be {' or '.join(must_be)}, not {reason['input']!r}")


def _depth(reason: ErrorDetails) -> int:
    return sum(isinstance(part, int) for part in reason["loc"])


def _path(reason: ErrorDetails, given: Any) -> Keys:
    """Return the keys in pydantic's `loc`, without its list indices and type names."""
    path: list[str] = []
    for part in reason["loc"]:
        if isinstance(given, dict) and part in given:
            path.append(str(part))
            given = given[part]
        elif isinstance(given, list) and isinstance(part, int):
            given = given[part]
    if reason["type"] == "missing":
        path.append(str(reason["loc"][-1]))
    elif reason["type"] == "unknown":
        path.append(reason["ctx"]["key"])
    return tuple(path)
