"""What a measure is: a name, what its result depends on, and how it is taken."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from safelora_fast.comparison.places import keep, read
from safelora_fast.errors import InterruptedRunError, SafeLoraFastError

if TYPE_CHECKING:
    from pathlib import Path

    from safelora_fast.comparison.places import Place
    from safelora_fast.comparison.workbench import Workbench

FAILURE = "failure"
OF = "of"


class Measure(Protocol):
    """One kind of measurement of a run, kept in a file of its own."""

    @property
    def name(self) -> str:
        """Of its file."""

    @property
    def title(self) -> str:
        """For people."""

    def place(self, place: Place) -> Place:
        """Where the adapter that is measured lies."""

    def applies(self, place: Place, bench: Workbench) -> bool:
        """Whether this run, or the reference, is measured."""

    def of(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """Settings and inputs that the result depends on, as plain values."""

    def take(self, place: Place, bench: Workbench) -> dict[str, Any]:
        """Measure.

        Raises:
            SafeLoraFastError: it cannot be measured.
        """


@dataclass(frozen=True)
class OfTheRun:
    """A measure of the run's own adapter."""

    name: str

    @property
    def title(self) -> str:
        """For people."""
        return self.name.replace("_", " ")

    def place(self, place: Place) -> Place:
        """Where the adapter that is measured lies."""
        return place


def folder_of(measure: Measure, place: Place, bench: Workbench) -> Path:
    """A folder beside the file for what a measurement keeps on its way; each settings' is another, so nothing is lost."""
    digest = hashlib.sha256(json.dumps(measure.of(place, bench), sort_keys=True).encode()).hexdigest()
    return place.folder / f"{measure.name}-{digest[:12]}"


def kept(measure: Measure, place: Place, bench: Workbench) -> dict[str, Any]:
    """What the file of a measurement holds, or why it failed; empty where it is not of these settings and inputs."""
    content = read(place.file(measure.name))
    return content if OF in content and content[OF] == _plain(measure.of(place, bench)) else {}


def is_taken(measure: Measure, place: Place, bench: Workbench) -> bool:
    """Whether the file of a measurement holds what these settings give."""
    content = kept(measure, place, bench)
    return bool(content) and FAILURE not in content


def take(measure: Measure, place: Place, bench: Workbench) -> str | None:
    """Measure, and keep the result or the reason why there is none; returns that reason.

    Raises:
        OutputError: the file cannot be written.
        InterruptedRunError: Ctrl-C.
    """
    of = _plain(measure.of(place, bench))
    try:
        content = measure.take(place, bench)
    except InterruptedRunError:
        raise
    except SafeLoraFastError as error:
        keep(place.file(measure.name), {OF: of, FAILURE: str(error)})
        return str(error)
    keep(place.file(measure.name), {OF: of, **content})
    return None


def _plain(of: dict[str, Any]) -> Any:
    return json.loads(json.dumps(of))
