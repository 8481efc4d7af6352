"""Names and types of the fields of another package's dataclass, read from its source: importing it would take seconds.

torch and transformers take several seconds to import, and a misspelt key should not cost that. The sources are followed
as an import would: through `from … import` lines to the class, and through its bases. Where that fails, the class is
imported after all.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
from pathlib import Path

from safelora_fast.errors import MissingDependencyError, how_to_install

NEEDED = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


class _NotFoundError(Exception):
    """The source does not say where the class is."""


def check_packages(what: str = "training") -> None:
    """Refuse to go on without the packages that training, and whatever else loads a model, needs.

    Args:
        what: needs them, for the message.

    Raises:
        MissingDependencyError: with their names and how to install them.
    """
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependencyError(f"{what} needs {', '.join(missing)}: {how_to_install('train')}")


@functools.cache
def dataclass_fields(package: str, name: str) -> dict[str, object]:
    """The arguments that a dataclass takes, with their annotations (source text, or types where it was imported).

    Args:
        package: "trl" or "peft", say.
        name: a public class of it.
    """
    try:
        return _fields(package, name)
    except (_NotFoundError, OSError, SyntaxError):
        cls = getattr(importlib.import_module(package), name)
        return {field.name: field.type for field in dataclasses.fields(cls) if field.init}


def _fields(module: str, name: str) -> dict[str, object]:
    module, definition = _locate(module, name)
    found: dict[str, object] = {}
    for base in definition.bases:
        if not isinstance(base, ast.Name):
            raise _NotFoundError
        found.update(_fields(module, base.id))
    if not any("dataclass" in ast.unparse(decorator) for decorator in definition.decorator_list):
        return found
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            annotation = _text(statement.annotation)
            if "ClassVar" not in annotation and not _not_an_argument(statement.value):
                found[statement.target.id] = annotation
    return found


def _text(annotation: ast.expr) -> str:
    """The annotation's source; one that is quoted is read as what the quotes hold."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value
    return ast.unparse(annotation)


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
                    return _locate(_absolute(module, file, node), alias.name, depth + 1)
    raise _NotFoundError


def _absolute(module: str, file: Path, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    package = parts if file.name == "__init__.py" else parts[:-1]
    package = package[: len(package) - (node.level - 1)]
    return ".".join([*package, *((node.module or "").split(".") if node.module else [])])


@functools.cache
def _parse(module: str) -> tuple[Path, ast.Module]:
    top, *rest = module.split(".")
    specification = importlib.util.find_spec(top)  # of a top-level package: nothing is imported
    if specification is None or not specification.submodule_search_locations:
        raise _NotFoundError
    place = Path(next(iter(specification.submodule_search_locations)), *rest)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return file, ast.parse(file.read_text(encoding="utf-8"))
