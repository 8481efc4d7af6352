"""The `defenses:` section: its keys are the names of the defence classes, their settings the constructors' arguments.

No defence is listed here: names, arguments, types and defaults are read from the classes, and a value that a constructor
refuses is refused in the constructor's words.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.defenses import registered
from safelora_fast.errors import SafeLoraFastError
from safelora_fast.files.json_reader import is_file
from safelora_fast.recipe.value_types import conforms, describe, read_annotation
from safelora_fast.subspace.safe_subspace import SafeSubspace

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from safelora_fast.defenses import Defense
    from safelora_fast.files.yaml_reader import Keys
    from safelora_fast.projection.project import Progress
    from safelora_fast.recipe.yaml_document import Document

SECTION = "defenses"
ON_NONFINITE = "on_nonfinite"
NOT_SETTINGS = {"cls", "progress", "threads"}


@dataclass(frozen=True)
class DefenseSpec:
    """One defence as the recipe asks for it.

    Attributes:
        kind: its class.
        settings: every argument of the constructor, defaults included, as YAML can say it.
    """

    kind: type[Defense]
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its key in the recipe and in metrics."""
        return self.kind.name

    def build(self, subspaces: Subspaces) -> Defense:
        """The defence; files are read, and subspaces are built unless `subspaces` only stands in for them."""
        arguments = {}
        for name, value in self.settings.items():
            if _takes(self.kind, name, "SafeSubspace"):
                arguments[name] = subspaces.get(value, vectors=not subspaces.builds or self.needs_vectors)
            else:
                arguments[name] = value
        return self.kind(**arguments)

    @property
    def needs_torch(self) -> bool:
        """Whether building it imports torch."""
        return any(_takes(self.kind, name, "Tensor") for name in self.settings)

    @cached_property
    def outline(self) -> Defense:
        """The defense without the vectors of a subspace that is yet to be built: enough to check it and estimate its cost."""
        return self.build(Subspaces(build=False))

    @property
    def needs_vectors(self) -> bool:
        """Whether its subspace must hold vectors U_k, or its sources suffice."""
        return self.outline.needs_vectors

    @property
    def subspace(self) -> str | dict[str, Any] | None:
        """Where its subspace comes from, if it has one: a file, or the arguments of `SafeSubspace.build`."""
        found = [value for name, value in self.settings.items() if _takes(self.kind, name, "SafeSubspace")]
        return found[0] if found else None


class Subspaces:
    """The subspaces that defences share: each file is read once, each pair of checkpoints streamed once.

    Args:
        build: build what is not in a file; otherwise an empty subspace stands in for it.
        progress: told how far building is.

    Attributes:
        builds: the argument `build`.
    """

    def __init__(self, *, build: bool, progress: Progress | None = None) -> None:
        self.builds = build
        self._progress = progress
        self._made: dict[str, SafeSubspace] = {}

    def get(self, source: str | dict[str, Any], *, vectors: bool) -> SafeSubspace:
        """The subspace of a file or of a pair of checkpoints; without `vectors` the pair is only named."""
        key = json.dumps([source, vectors], sort_keys=True)
        if key not in self._made:
            self._made[key] = self._make(source, vectors=vectors)
        return self._made[key]

    def _make(self, source: str | dict[str, Any], *, vectors: bool) -> SafeSubspace:
        if isinstance(source, str):
            return SafeSubspace.load(source)
        if not self.builds:
            sources = {role: {"path": source[role]} for role in ("aligned", "base")}
            return SafeSubspace({}, sources, {"rank": source.get("rank")})
        if not vectors:
            return SafeSubspace.from_sources(aligned=source["aligned"], base=source["base"])
        return SafeSubspace.build(**source, progress=self._progress or False)


def defense_classes() -> dict[str, type[Defense]]:
    """Every defence that can be given by name, in alphabetical order."""
    return registered()


def read_defenses(document: Document) -> tuple[DefenseSpec, ...]:
    """The checked section. `NAME:` alone and `NAME: true` take the defaults, `NAME: false` leaves the defence out.

    Raises:
        SettingsError: a defence or a setting does not exist, is missing, of another type, or refused by the defence.
    """
    known = defense_classes()
    specs = []
    for name, given in document.section(SECTION).items():
        keys = (SECTION, name)
        if name == ON_NONFINITE or given is False:
            continue
        if name not in known:
            raise document.unknown(keys, [*known, ON_NONFINITE])
        settings = {} if given is None or given is True else given
        if not isinstance(settings, dict):
            raise document.problem(keys, f"must be a mapping of settings, true or false, not {given!r}")
        specs.append(_read_one(document, keys, known[name], settings))
    return tuple(specs)


def _read_one(document: Document, keys: Keys, kind: type[Defense], given: dict[str, Any]) -> DefenseSpec:
    settings = check_arguments(document, keys, kind, given)
    spec = DefenseSpec(kind, settings)
    if not spec.needs_torch:
        try:
            _ = spec.outline
        except SafeLoraFastError as error:
            named = [name for name in given if re.search(rf"\b{name}\b", str(error))]
            raise document.problem((*keys, *named) if len(named) == 1 else keys, str(error)) from error
    if isinstance(spec.subspace, dict) and not spec.needs_vectors:
        of_vectors = [name for name in given["subspace"] if name not in {"aligned", "base"}]
        if of_vectors:
            why = (
                "a projection at the end reads only aligned and base; the rank of its operator is a setting beside them"
            )
            raise document.problem((*keys, "subspace", of_vectors[0]), why)
    return spec


def check_arguments(
    document: Document,
    keys: Keys,
    function: Callable[..., Any],
    given: dict[str, Any],
    *,
    but: Collection[str] = NOT_SETTINGS,
) -> dict[str, Any]:
    """Every argument of a callable, from what is given and its defaults.

    Raises:
        SettingsError: an argument does not exist, is missing, or of another type.
    """
    parameters = {name: p for name, p in inspect.signature(function).parameters.items() if name not in but}
    checked = {}
    for name, value in given.items():
        if name not in parameters:
            raise document.unknown((*keys, name), parameters)
        checked[name] = _checked(document, (*keys, name), function, value)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in given:
            raise document.problem(keys, f"needs {name}")
    return {name: checked.get(name, parameter.default) for name, parameter in parameters.items()}


def _checked(document: Document, keys: Keys, function: Callable[..., Any], value: Any) -> Any:
    """The value of one argument, which the last of the keys names."""
    name = keys[-1]
    if _takes(function, name, "SafeSubspace"):
        if isinstance(value, dict):
            return check_arguments(document, keys, SafeSubspace.build, value)
        if not isinstance(value, str):
            raise document.problem(keys, f"must be a file, or {{aligned: …, base: …, rank: …}}, not {value!r}")
        if not is_file(value):
            raise document.problem(keys, f"there is no file {value}; make it with `safelora-fast subspace build`")
        return value
    if _takes(function, name, "Tensor"):
        if isinstance(value, str) and not is_file(value):
            raise document.problem(keys, f"there is no file {value}")
        if not isinstance(value, str) and not conforms(value, list[float]):
            raise document.problem(keys, f"must be a file or a list of numbers, not {value!r}")
        return value
    names = vars(sys.modules[function.__module__])
    kind = read_annotation(inspect.signature(function).parameters[name].annotation, names)
    if not conforms(value, kind):
        raise document.problem(keys, f"must be {describe(kind)}, not {value!r}")
    return value


def _takes(function: Callable[..., Any], argument: str, what: str) -> bool:
    return what in str(inspect.signature(function).parameters[argument].annotation)


def is_at_hand(spec: DefenseSpec) -> bool:
    """Whether a defense can be made without building a subspace of vectors or fetching its sources."""
    source = spec.subspace
    if not isinstance(source, dict):
        return True
    return not spec.needs_vectors and all(Path(source[role]).expanduser().exists() for role in ("aligned", "base"))
