"""The arguments of TRL and PEFT classes, read from source code to avoid the slow import of torch and transformers.

The parser follows `from … import` lines to the class and its base classes. If that fails, the class is imported.
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
    """The class definition cannot be found in the source code."""


def check_packages(what: str = "training") -> None:
    """Check that the packages for training, or for another command that loads a model, are installed.

    Args:
        what: the command's name for the message.

    Raises:
        MissingDependencyError: packages are missing; the message names them and says how to install them.
    """
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependencyError(f"{what} needs {', '.join(missing)}: {how_to_install('train')}")


class _Names(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        return Any


def read_annotation(annotation: object, names: Mapping[str, Any] | None = None) -> Any:
    """Return the type of an annotation; Any if resolving it would require importing a large package.

    Args:
        annotation: a type, or its source text.
        names: known names in the text, in addition to built-in types and those of `typing`.
    """
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, {"__builtins__": {}}, _Names({**KNOWN, **(names or {})}))  # noqa: S307
    except (TypeError, SyntaxError, AttributeError):
        return Any


@functools.cache
def dataclass_fields(package: str, name: str) -> dict[str, str]:
    """Return the arguments of a dataclass with the source text of their annotations.

    Args:
        package: "trl" or "peft".
        name: a public class of that package.
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
    """Find the module that defines a class, starting at a module that defines or imports it."""
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
    specification = importlib.util.find_spec(top)  # for a top-level package, this imports nothing
    if specification is None or not specification.submodule_search_locations:
        raise _NotFoundError
    place = Path(next(iter(specification.submodule_search_locations)), *rest)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return file, ast.parse(file.read_text(encoding="utf-8"))
