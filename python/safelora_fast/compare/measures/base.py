"""What a measure is: a name, what its result depends on, and how it is taken."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from safelora_fast.compare.failed_measurements import FAILURE, UNFINISHED, not_finite
from safelora_fast.compare.paths import keep, read
from safelora_fast.errors import InterruptedRunError, SafeLoraFastError
from safelora_fast.files.digest import text_digest
from safelora_fast.models.foreign_errors import first_line

if TYPE_CHECKING:
    from pathlib import Path

    from safelora_fast.compare.paths import Place
    from safelora_fast.compare.shared_models import Workbench

OF = "of"


class Measure(Protocol):
    """One kind of measurement of a run, kept in a file of its own."""

    @property
    def name(self) -> str:
        """Of its file."""

    @property
    def title(self) -> str:
        """For people."""

    @property
    def batched(self) -> bool:
        """Whether `measure.batch_size` says how much memory it needs."""

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
    batched: bool = False

    @property
    def title(self) -> str:
        """For people."""
        return self.name.replace("_", " ")

    def place(self, place: Place) -> Place:
        """Where the adapter that is measured lies."""
        return place


def folder_of(measure: Measure, place: Place, bench: Workbench) -> Path:
    """A folder beside the file for what a measurement keeps on its way; each settings' is another, so nothing is lost."""
    return place.folder / f"{measure.name}-{text_digest(measure.of(place, bench))[:12]}"


def kept(measure: Measure, place: Place, bench: Workbench) -> dict[str, Any]:
    """What the file of a measurement holds, or why it failed; empty where it is not of these settings and inputs."""
    content = read(place.file(measure.name))
    return content if OF in content and content[OF] == _plain(measure.of(place, bench)) else {}


def is_taken(measure: Measure, place: Place, bench: Workbench) -> bool:
    """Whether the file of a measurement holds all that these settings give."""
    content = kept(measure, place, bench)
    return bool(content) and not {FAILURE, UNFINISHED} & content.keys()


def take(measure: Measure, place: Place, bench: Workbench) -> str | None:
    """Measure, and keep the result or the reason why there is none, or not all of it; returns that reason.

    Raises:
        OutputError: the file cannot be written.
        InterruptedRunError: Ctrl-C.
    """
    of = _plain(measure.of(place, bench))
    content = _content(measure, place, bench)
    keep(place.file(measure.name), {OF: of, **content})
    failure: str | None = content.get(FAILURE) or content.get(UNFINISHED)
    return failure


def _content(measure: Measure, place: Place, bench: Workbench) -> dict[str, Any]:
    """What a measurement finds, or why it finds nothing; where that is for want of memory, none is held on to."""
    try:
        return checked(measure.take(place, bench))
    except InterruptedRunError:
        raise
    except SafeLoraFastError as error:
        if not isinstance(error.__cause__, torch.OutOfMemoryError):
            return {FAILURE: str(error)}
        batch = str(error).rpartition(":")[0]  # what comes after it is for callers of the function
        said = batch if "out of memory" in batch else _out_of_memory(error.__cause__)
    except torch.OutOfMemoryError as error:
        said = _out_of_memory(error)
    bench.release(reference=True)  # not before the error and what it holds are gone
    return {FAILURE: f"{said}: {_what_to_lower(measure, bench)}"}


def _out_of_memory(error: torch.OutOfMemoryError) -> str:
    """The allocator's own words, but for those on every process of the device."""
    return f"out of memory ({'. '.join(first_line(error).split('. ')[:2])})"


def _what_to_lower(measure: Measure, bench: Workbench) -> str:
    settings, advice = bench.settings, []
    if measure.batched:
        advice.append(f"lower measure.batch_size, now {bench.config.measure.batch_size}")
    if settings.dtype == "float32":
        advice.append("set measure.dtype to bfloat16")
    if settings.device != "cpu":
        advice.append("set measure.device to cpu")
    return ", or ".join(advice) or "free some of it; the model and its reference are in memory together"


def checked(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a measurement, which stands for itself, or that it is not finite."""
    flaw = not_finite(part)
    return part if flaw is None else {FAILURE: flaw}


def _plain(of: dict[str, Any]) -> Any:
    return json.loads(json.dumps(of))
