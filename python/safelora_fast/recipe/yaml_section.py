"""A section of a YAML file as a dataclass: known keys only, each of its type; a field that is a dataclass is a section too."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from safelora_fast.recipe.value_types import conforms, describe

if TYPE_CHECKING:
    from safelora_fast.files.yaml_reader import Keys
    from safelora_fast.recipe.yaml_document import Document

Section = TypeVar("Section")


def read_section(document: Document, keys: Keys, cls: type[Section]) -> Section:
    """Read the section that some keys lead to; one that is absent has the defaults.

    Raises:
        SettingsError: with the file, the line and the dotted key.
    """
    given = dict(document.section(*keys))
    kinds = get_type_hints(cls)
    for key, value in given.items():
        if key not in kinds:
            raise document.unknown((*keys, key), kinds)
        inner = _section_in(kinds[key])
        if inner is not None:
            given[key] = None if value is None else read_section(document, (*keys, key), inner)
            continue
        if not conforms(value, kinds[key]):
            raise document.problem((*keys, key), f"must be {describe(kinds[key])}, not {value!r}")
        if value == "":
            raise document.problem((*keys, key), "is empty")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if not optional and field.name not in given:
            raise document.problem((*keys, field.name), "missing")
    return cls(**given)


def _section_in(kind: Any) -> type[Any] | None:
    """The dataclass that a type is, or may be."""
    candidates = [kind, *get_args(kind)]
    return next((one for one in candidates if isinstance(one, type) and dataclasses.is_dataclass(one)), None)
