"""What every reader of results has: the gate's subject, the value that it returns, and checks of what it reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from safelora_fast.checkpoints.resolver import ADAPTER_CONFIG, CONFIG
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.files.json_reader import NUMBER, of_kind, read_object, why
from safelora_fast.recipe.model_stamp import adapter_digest, model_digest
from safelora_fast.scoring.intervals import Interval

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from safelora_fast.gate.criterion import Criterion


@dataclass(frozen=True)
class Subject:
    """The adapter or model that is to be released.

    Attributes:
        folder: its folder.
        key: "adapter_sha256" or "model_sha256", the name of its digest in results.
        sha256: the digest.
        data: the file that the policy names as its training data; None if it names none.
    """

    folder: Path
    key: str
    sha256: str
    data: Path | None = None

    def check(self, stamp: Mapping[str, Any], where: object) -> None:
        """Raise DataError unless a result with these digests is of this subject."""
        found = stamp.get(self.key)
        if found is None:
            raise DataError(f"{where}: does not say which {self.key.partition('_')[0]} it is of; make it again")
        if found != self.sha256 or (self.key == "model_sha256" and stamp.get("adapter_sha256") is not None):
            raise DataError(f"{where}: is stale: made of other files than {self.folder} has now; make it again")


def subject_of(folder: Path) -> Subject:
    """Return the subject in a folder.

    Raises:
        SettingsError: the folder holds neither an adapter nor a model.
        SafeLoraFastError: a file cannot be read.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return Subject(folder, "adapter_sha256", str(adapter_digest(folder)))
    if (folder / CONFIG).is_file():
        return Subject(folder, "model_sha256", str(model_digest(str(folder))))
    raise SettingsError(f"{folder}: holds neither {ADAPTER_CONFIG} nor {CONFIG}; set subject: in the policy")


@dataclass(frozen=True)
class Reading:
    """A value from a result.

    Attributes:
        value: None if nothing was measured.
        interval: the 95 % interval; None if the result has none.
        exact: whether the value has no sampling error, e.g. a count.
        unscored: share of answers, or examples, without a score.
        count: what the value is of, e.g. "3 of 240 answers".
    """

    value: float | None
    interval: Interval | None = None
    exact: bool = False
    unscored: float = 0.0
    count: str = ""


class Reader(ABC):
    """Reads the results of one command. See :data:`~safelora_fast.gate.readers.READERS`.

    Attributes:
        name: `source:` in a policy.
        path: default of `path:`, relative to the checked folder; None for the subject's folder.
        metric: default of `metric:`; None if there is none.
        has_runs: whether a criterion must name a run.
        own_keys: other keys of a criterion that only this source has.
    """

    name: ClassVar[str]
    path: ClassVar[str | None]
    metric: ClassVar[str | None] = None
    has_runs: ClassVar[bool] = False
    own_keys: ClassVar[tuple[str, ...]] = ()

    def find(self, criterion: Criterion, folder: Path, subject: Subject) -> Path:
        """Return the path of the result that a criterion names."""
        given = criterion.path or self.path
        return subject.folder if given is None else folder / given

    def is_share(self, criterion: Criterion) -> bool:
        """Return whether the metric lies between 0 and 1."""
        del criterion
        return False

    @abstractmethod
    def read(self, path: Path, criterion: Criterion, subject: Subject) -> Reading:
        """Return the value of a criterion's metric.

        Raises:
            DataError: the result is missing or of another subject, or lacks the metric.
            OSError, ValueError: a file cannot be read, or its content is damaged.
        """


def stored_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise DataError, which names the file, if there is none."""
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: {why(error)}") from error


def item_of(items: Mapping[str, Any], name: str, what: str, where: object) -> Any:
    """Return an item by name; raise DataError, which lists the names, if there is none."""
    if name not in items:
        raise DataError(f"{where}: there is no {what} {name!r}; it has {', '.join(map(str, items)) or 'none'}")
    return items[name]


def interval_of(ends: list[Any]) -> Interval | None:
    """Return the interval with these ends; None if an end is missing."""
    if any(end is None for end in ends):
        return None
    low, high = (of_kind(end, NUMBER, "interval") for end in ends)
    return Interval(low, high)
