"""The report of a comparison as plain values: the content of `report.json`, from which the page and the text are made.

A report knows nothing of how its values were found, so anybody who has values can make one.
"""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - pydantic reads the annotations
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from safelora_fast.errors import DataError
from safelora_fast.files.json_reader import read_object, why
from safelora_fast.files.store import without_nan

if TYPE_CHECKING:
    from pathlib import Path

Criterion = Literal["aligned", "benign", "narrow", "coherent", "cost"]
FORMAT = 1
SWEEP_TITLE = "SafeLoRA by threshold"
# What a provider must see of each defense (Kaczér et al., arXiv 2508.06249, section 3), and what it costs.
CRITERIA: dict[Criterion, str] = {
    "aligned": "no emergent misalignment",
    "benign": "benign tasks still learned",
    "narrow": "narrow behavior still learnable",
    "coherent": "coherent answers",
    "cost": "cost",
}

NOT_TRAINED, NOT_MEASURED = PENDING = "not trained yet", "not measured yet"
FAILED, NOT_DONE = "failed", "not done yet"


@dataclass(frozen=True)
class Column:
    """One measure.

    Attributes:
        key: its name in files.
        criterion: what it speaks to, a key of :data:`CRITERIA`.
        title: its name for people, short.
        unit: "%" for shares (values are shares of 1), "nats", "s", "GB", "×" or "".
        better: which way is good; None if neither is.
        note: what it is, in a sentence.
    """

    key: str
    criterion: Criterion
    title: str
    unit: str
    better: Literal["lower", "higher"] | None
    note: str


@dataclass(frozen=True)
class SeedValue:
    """The value of one run; None if it failed.

    Attributes:
        seed: of the run.
        value: of the run.
        source: the file that it came from, relative to the report.
        failure: why there is no value.
    """

    seed: int
    value: float | None
    source: str
    failure: str | None = None

    @property
    def missing(self) -> str | None:
        """Why there is no value, in few words: "failed", or what is not done yet; None if there is a value."""
        if self.failure is None:
            return None
        return next((words for words in PENDING if self.failure.endswith(words)), FAILED)

    @property
    def pending(self) -> bool:
        """Whether there is no value because nothing has been done yet, for this run or for what it is compared with."""
        return self.missing in PENDING


@dataclass(frozen=True)
class Cell:
    """A defense by a measure.

    Attributes:
        value: mean over the seeds that have one; None if none has.
        low, high: ends of the 95 % interval; None if there is none.
        seeds: one by one.
        count: what the value is a share of, in words ("12 of 240 scored, 3 unscored").
    """

    value: float | None
    low: float | None
    high: float | None
    seeds: tuple[SeedValue, ...]
    count: str = ""

    @property
    def failures(self) -> list[SeedValue]:
        """The runs without a value, including those that are not done yet."""
        return [seed for seed in self.seeds if seed.failure is not None]

    @property
    def missing(self) -> str | None:
        """Why the cell has no value, in few words; None if it has one, or if there was nothing to measure."""
        kinds = {seed.missing for seed in self.failures}
        if self.value is not None or not kinds:
            return None
        return FAILED if FAILED in kinds else kinds.pop() if len(kinds) == 1 else NOT_DONE


@dataclass(frozen=True)
class Row:
    """A defense, or the reference.

    Attributes:
        name: as the configuration has it.
        setting: its weights, in words.
        cells: by the column's key; a measure that was not asked for has none.
        kind: "reference" (before the fine-tune), "undefended" or "defense"; reports of 0.1.0 say "defence".
    """

    name: str
    setting: str
    cells: Mapping[str, Cell]
    kind: Literal["reference", "undefended", "defense", "defence"] = "defense"


@dataclass(frozen=True)
class Plot:
    """Learning against drift.

    Attributes:
        x: key of the column that says what was learned.
        y: key of the column that says how far the model drifted.
        path: points (x, y, label) of the undefended update as it is scaled down, from none of it to all; may be empty.
    """

    x: str
    y: str
    path: tuple[tuple[float | None, float | None, str], ...] = ()


@dataclass(frozen=True)
class SweepPoint:
    """The undefended adapter projected by SafeLoRA at one threshold.

    Attributes:
        threshold: τ; modules with a cosine of at most τ are projected.
        projected: how many, mean over seeds.
        modules: of how many.
        cells: by the column's key.
    """

    threshold: float
    projected: float
    modules: int
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Failure:
    """Something that failed and has no cell, because it is part of a curve.

    Attributes:
        row: name of the row whose run it is.
        seed: of the run.
        what: what was to be measured; :data:`SWEEP_TITLE` for the sweep as a whole.
        reason: why there is nothing.
    """

    row: str
    seed: int
    what: str
    reason: str


@dataclass(frozen=True)
class ComparisonReport:
    """Everything.

    Attributes:
        title: what was compared on what.
        facts: what a reader must know to read the values (model, data, steps, seeds, machine), by label.
        columns: in the order in which they are shown.
        rows: the reference first, then the undefended run, then the defenses.
        plot: None if its columns were not measured.
        sweep: by threshold, rising; empty if there was none.
        failed: what is missing in the plot's path and in the sweep.
        reading: sentences that follow from the values.
        complete: False while runs or measures that were asked for are missing.
    """

    title: str
    facts: Mapping[str, str]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    plot: Plot | None = None
    sweep: tuple[SweepPoint, ...] = ()
    failed: tuple[Failure, ...] = ()
    reading: tuple[str, ...] = ()
    complete: bool = True
    format: int = field(default=FORMAT)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN is None."""
        content: dict[str, Any] = without_nan(asdict(self))
        return {"format": content.pop("format"), **content}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ComparisonReport:
        """The report that :meth:`to_dict` gave.

        Raises:
            DataError: it is no such content, or of another format.
        """
        from pydantic import TypeAdapter, ValidationError

        if content.get("format") != FORMAT:
            raise DataError(f"this is no comparison report of format {FORMAT}")
        try:
            return TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise DataError(f"this comparison report is damaged: {place}: {first['msg']}") from error


def read_report(path: Path) -> ComparisonReport:
    """Read `report.json`.

    Raises:
        DataError: it cannot be read, or is no report.
    """
    try:
        return ComparisonReport.from_dict(read_object(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the report {why(error)}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
