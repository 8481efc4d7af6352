"""The arguments of classes of TRL and PEFT, read from their source: importing torch and transformers would take seconds.

The sources are followed as an import would: through `from … import` lines to the class, and through its bases. Where that
fails, the class is imported after all.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safelora_fast.errors import MissingDependencyError, how_to_install

NEEDED = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "pydantic", "yaml")
KNOWN = {
    **{kind.__name__: kind for kind in (bool, int, float, str, list, dict, tuple, Mapping, Sequence)},
    **{name: getattr(typing, name) for name in ("Literal", "Optional", "Union", "List", "Dict", "Tuple")},
    "typing": typing,
}


class _NotFoundError(Exception):
    """The source does not say where the class is."""


def check_packages(what: str = "training") -> None:
    """Refuse to go on without the packages that training, or another command that loads a model, needs.

    Args:
        what: the command, for the message.

    Raises:
        MissingDependencyError: with their names and how to install them.
    """
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependencyError(f"{what} needs {', '.join(missing)}: {how_to_install('train')}")


class _Names(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        return Any


def read_annotation(annotation: object, names: Mapping[str, Any] | None = None) -> Any:
    """The type that an annotation stands for; Any where only an import of a large package would tell.

    Args:
        annotation: a type, or its source text.
        names: what names in the text mean, beside the built-in types and those of `typing`.
    """
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, {"__builtins__": {}}, _Names({**KNOWN, **(names or {})}))  # noqa: S307
    except (TypeError, SyntaxError, AttributeError):
        return Any


@functools.cache
def dataclass_fields(package: str, name: str) -> dict[str, str]:
    """The arguments that a dataclass takes, with the source text of their annotations.

    Args:
        package: "trl" or "peft".
        name: a public class of it.
    """
    try:
        return _fields(package, name)
    except (_NotFoundError, OSError, SyntaxError):
        cls = getattr(importlib.import_module(package), name)
        return {field.name: "Any" for field in dataclasses.fields(cls) if field.init}


def _fields(module: str, name: str) -> dict[str, str]:
    module, definition = _locate(module, name)
    found: dict[str, str] = {}
    for base in definition.bases:
        if not isinstance(base, ast.Name):
            raise _NotFoundError
        found.update(_fields(module, base.id))
    if not any("dataclass" in ast.unparse(decorator) for decorator in definition.decorator_list):
        return found
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            quoted = isinstance(statement.annotation, ast.Constant) and isinstance(statement.annotation.value, str)
            annotation = str(statement.annotation.value) if quoted else ast.unparse(statement.annotation)  # type: ignore[attr-defined]
            if "ClassVar" not in annotation and not _not_an_argument(statement.value):
                found[statement.target.id] = annotation
    return found


def _not_an_argument(value: ast.expr | None) -> bool:
    keywords = value.keywords if isinstance(value, ast.Call) else []
    return any(word.arg == "init" and ast.unparse(word.value) == "False" for word in keywords)


def _locate(module: str, name: str, depth: int = 0) -> tuple[str, ast.ClassDef]:
    """The module that defines a class which `module` defines or imports."""
    if depth > 8:
        raise _NotFoundError
    file, tree = _parse(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
                    source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                    return _locate(source, alias.name, depth + 1)
    raise _NotFoundError


@functools.cache
def _parse(module: str) -> tuple[Path, ast.Module]:
    top, *rest = module.split(".")
    specification = importlib.util.find_spec(top)  # of a top-level package: nothing is imported
    if specification is None or not specification.submodule_search_locations:
        raise _NotFoundError
    place = Path(next(iter(specification.submodule_search_locations)), *rest)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return file, ast.parse(file.read_text(encoding="utf-8"))
