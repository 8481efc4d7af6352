"""The `defenses:` and `monitors:` sections: the settings of a defense or monitor are its constructor's arguments.

This module lists no defenses. It reads names, arguments, types and defaults from the classes, and passes a
constructor's error messages on to the user.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from safelora_fast.configuration.yaml_section import check, section_of
from safelora_fast.defenses import DriftMonitor, registered
from safelora_fast.errors import SafeLoraFastError
from safelora_fast.files.json_reader import is_file
from safelora_fast.subspace.safe_subspace import SafeSubspace

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from safelora_fast.configuration.yaml_document import Document
    from safelora_fast.configuration.yaml_section import Section
    from safelora_fast.defenses import Defense
    from safelora_fast.files.yaml_reader import Keys
    from safelora_fast.projection.project import Progress

SECTION = "defenses"
ON_NONFINITE = "on_nonfinite"
REFERENCE = "reference"
OPTIONS = (ON_NONFINITE, REFERENCE)  # keys of the section that are no defenses
MONITORS = "monitors"
OnNonFinite = Literal["raise", "skip"]
BASE, CACHE = "base", "cache:"  # beginning of "cache:FOLDER"


class Subspaces:
    """A cache of the subspaces that defenses share: each file is read once, each pair of checkpoints streamed once.

    Args:
        build: build subspaces that are not in a file; if False, use an empty placeholder for them.
        progress: receives the progress of building.
    """

    def __init__(self, *, build: bool, progress: Progress | None = None) -> None:
        self._build = build
        self._progress = progress
        self._made: dict[str, SafeSubspace] = {}

    def get(self, source: str | dict[str, Any], *, vectors: bool) -> SafeSubspace:
        """Return the subspace from a file or a pair of checkpoints.

        Args:
            source: the file, or the arguments of `SafeSubspace.build`.
            vectors: whether to compute the singular vectors of a pair; otherwise only record the two checkpoints.
        """
        key = json.dumps([source, vectors], sort_keys=True)
        if key in self._made:
            return self._made[key]
        if isinstance(source, str):
            made = SafeSubspace.load(source)
        elif not self._build:
            sources = {role: {"path": source[role]} for role in ("aligned", "base")}
            made = SafeSubspace({}, sources, {"rank": source.get("rank")})
        elif vectors:
            made = SafeSubspace.build(**source, progress=self._progress or False)
        else:
            made = SafeSubspace.from_sources(aligned=source["aligned"], base=source["base"])
        return self._made.setdefault(key, made)


@dataclass(frozen=True)
class DefenseSpec:
    """One defense with the settings from the recipe.

    Attributes:
        kind: its class.
        settings: all constructor arguments, including defaults, as YAML values.
        known: the cache of subspaces that are stored in files.
    """

    kind: type[Defense]
    settings: Mapping[str, Any]
    known: Subspaces = field(default_factory=lambda: Subspaces(build=False), compare=False, repr=False)

    @property
    def name(self) -> str:
        """The defense's key in the recipe and in metrics."""
        return self.kind.name

    @property
    def subspace(self) -> str | dict[str, Any] | None:
        """The source of its subspace: a file, the arguments of `SafeSubspace.build`, or None."""
        found = [value for name, value in self.settings.items() if _takes(self.kind, name, "SafeSubspace")]
        return found[0] if found else None

    @cached_property
    def outline(self) -> Defense:
        """The defense, with an empty subspace if that must still be built: enough for checks and cost estimates."""
        return self._with(lambda source: self.known.get(source, vectors=True))

    def build(self, subspaces: Subspaces) -> Defense:
        """Return the defense for training; build its subspace if that is not stored in a file."""
        if not isinstance(self.subspace, dict):
            return self.outline
        return self._with(lambda source: subspaces.get(source, vectors=self.outline.needs_vectors))

    def rehearsed(self) -> Defense | None:
        """Return the defense for the rehearsal; None if its subspace must be built or its checkpoints fetched first."""
        if isinstance(self.subspace, dict):
            pair = [Path(self.subspace[role]).expanduser() for role in ("aligned", "base")]
            if self.outline.needs_vectors or not all(path.exists() for path in pair):
                return None
        return self.build(Subspaces(build=True))

    def _with(self, subspace: Callable[[Any], SafeSubspace]) -> Defense:
        takes = {name for name in self.settings if _takes(self.kind, name, "SafeSubspace")}
        arguments = {name: subspace(value) if name in takes else value for name, value in self.settings.items()}
        return self.kind(**arguments)


@dataclass(frozen=True)
class MonitorSpec:
    """One monitor from the recipe: its name in the log (`monitor/<name>`) and DriftMonitor's other arguments."""

    name: str
    settings: Mapping[str, Any]

    def build(self) -> DriftMonitor:
        """Return the monitor after reading its vector file.

        Raises:
            SettingsError: the vector or the name is invalid.
        """
        return DriftMonitor(**self.settings, name=self.name)


def read_defenses(document: Document) -> tuple[DefenseSpec, ...]:
    """Read and check the `defenses:` section.

    `NAME:` alone and `NAME: true` select the defaults; `NAME: false` leaves the defense out.

    Raises:
        SettingsError: a defense or setting is unknown, missing, of the wrong type, or rejected by the defense.
    """
    known, subspaces = registered(), Subspaces(build=False)
    specs = []
    for name, given in document.section(SECTION).items():
        keys = (SECTION, name)
        if name in OPTIONS or given is False:
            continue
        if name not in known:
            raise document.unknown(keys, [*known, *OPTIONS])
        settings = {} if given is None or given is True else given
        if not isinstance(settings, dict):
            raise document.problem(keys, f"must be a mapping of settings, true or false, not {given!r}")
        specs.append(_read_defense(document, keys, known[name], settings, subspaces))
    return tuple(specs)


def _read_defense(
    document: Document, keys: Keys, kind: type[Defense], given: dict[str, Any], subspaces: Subspaces
) -> DefenseSpec:
    spec = DefenseSpec(kind, check(document, keys, _section(kind), given).model_dump(), subspaces)
    if not any(_takes(kind, name, "Tensor") for name in spec.settings):  # constructing the defense imports torch
        try:
            _ = spec.outline
        except SafeLoraFastError as error:
            named = [name for name in given if re.search(rf"\b{name}\b", str(error))]
            raise document.problem((*keys, *named) if len(named) == 1 else keys, str(error)) from error
    if isinstance(spec.subspace, dict) and not spec.outline.needs_vectors:
        for name in given["subspace"].keys() - {"aligned", "base"}:
            why = "a projection at the end reads only aligned and base; its operator's rank is a setting beside them"
            raise document.problem((*keys, "subspace", name), why)
    return spec


def read_monitors(document: Document) -> tuple[MonitorSpec, ...]:
    """Read and check the `monitors:` section.

    Raises:
        SettingsError: a setting is unknown, missing, or of the wrong type.
    """
    specs, section = [], _section(DriftMonitor, but={"name"})
    for name, given in document.section(MONITORS).items():
        keys = (MONITORS, name)
        if not isinstance(given, dict):
            raise document.problem(keys, f"must be a mapping of settings (vector, layer), not {given!r}")
        specs.append(MonitorSpec(name, check(document, keys, section, given).model_dump()))
    return tuple(specs)


def read_on_nonfinite(document: Document) -> OnNonFinite:
    """Read what to do when a defense's term is NaN or infinite.

    Raises:
        SettingsError: it is neither "raise" nor "skip".
    """
    value = document.section(SECTION).get(ON_NONFINITE, "raise")
    if value not in get_args(OnNonFinite):
        raise document.problem((SECTION, ON_NONFINITE), f"must be {' or '.join(get_args(OnNonFinite))}, not {value!r}")
    chosen: OnNonFinite = value
    return chosen


def read_reference(document: Document) -> str:
    """Read the reference: "base", or "cache:FOLDER" to keep its hidden states on disk.

    Raises:
        SettingsError: it is something else.
    """
    value = document.section(SECTION).get(REFERENCE, BASE)
    if value != BASE and not (isinstance(value, str) and value.removeprefix(CACHE).strip() not in {value, ""}):
        raise document.problem((SECTION, REFERENCE), f"must be {BASE} or {CACHE}FOLDER, not {value!r}")
    chosen: str = value
    return chosen


def _section(kind: Callable[..., Any], but: Collection[str] = ()) -> type[Section]:
    """Return the schema of a defense or monitor; in YAML, subspaces and vectors are given as files."""
    types = {}
    for name in inspect.signature(kind).parameters:
        if _takes(kind, name, "SafeSubspace"):
            build = section_of(SafeSubspace.build, but={"progress", "threads"})
            types[name] = Annotated[str, AfterValidator(_subspace_file)] | build
        elif _takes(kind, name, "Tensor"):
            types[name] = Annotated[str, AfterValidator(_file)] | list[float]
    return section_of(kind, types=types, but=but)


def _file(path: str, hint: str = "") -> str:
    if not is_file(path):
        raise PydanticCustomError("no_file", "there is no file {path}{hint}", {"path": path, "hint": hint})
    return path


def _subspace_file(path: str) -> str:
    return _file(path, "; make it with `safelora-fast subspace build`")


def _takes(function: Callable[..., Any], argument: str, what: str) -> bool:
    return what in str(inspect.signature(function).parameters[argument].annotation)
