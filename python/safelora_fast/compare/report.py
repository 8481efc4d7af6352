"""The report of a comparison as plain values: the content of `report.json`, and the source of page and Markdown.

A report does not depend on how its values were measured, so other programs can build one.
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
# What a provider must know about each defense (Kaczér et al., arXiv 2508.06249, section 3), and its cost.
CRITERIA: dict[Criterion, str] = {
    "aligned": "no emergent misalignment",
    "benign": "benign tasks still learned",
    "narrow": "narrow behavior still learnable",
    "coherent": "coherent answers",
    "cost": "cost",
}

NOT_TRAINED, NOT_MEASURED, NOT_READ = PENDING = "not trained yet", "not measured yet", "not read yet"
FAILED, NOT_DONE = "failed", "not done yet"


@dataclass(frozen=True)
class Column:
    """One column of the report.

    Attributes:
        key: name in files.
        criterion: a key of :data:`CRITERIA`.
        title: short name shown to users.
        unit: "%" for shares (values are shares of 1), "nats", "s", "GB", "×" or "".
        better: which direction is good; None if neither is.
        note: explanation in one sentence.
    """

    key: str
    criterion: Criterion
    title: str
    unit: str
    better: Literal["lower", "higher"] | None
    note: str


@dataclass(frozen=True)
class SeedValue:
    """The value of one run; None if it failed or is not done yet.

    Attributes:
        seed: seed of the run.
        value: value of the run.
        source: source file, relative to the report.
        failure: why there is no value.
    """

    seed: int
    value: float | None
    source: str
    failure: str | None = None

    @property
    def missing(self) -> str | None:
        """Why there is no value, in short: "failed", or which step is not done yet; None if there is a value."""
        if self.failure is None:
            return None
        return next((words for words in PENDING if self.failure.endswith(words)), FAILED)

    @property
    def pending(self) -> bool:
        """Whether the value is missing because this run, or the run it is compared with, is not done yet."""
        return self.missing in PENDING


@dataclass(frozen=True)
class Cell:
    """The values of one defense in one column.

    Attributes:
        value: mean over the seeds that have a value; None if no seed has one.
        low, high: ends of the 95 % interval; None if there is none.
        seeds: the value of each seed.
        count: description of what the value is a share of ("12 of 240 scored, 3 unscored").
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
        """Why the cell has no value, in short; None if it has one, or if there was nothing to measure."""
        kinds = {seed.missing for seed in self.failures}
        if self.value is not None or not kinds:
            return None
        return FAILED if FAILED in kinds else kinds.pop() if len(kinds) == 1 else NOT_DONE


@dataclass(frozen=True)
class Row:
    """A defense, or the reference.

    Attributes:
        name: name in the configuration.
        setting: its settings as text.
        cells: cells by column key; measures that were not requested have none.
        kind: "reference" (before the fine-tune), "undefended" or "defense"; reports of 0.1.0 say "defence".
    """

    name: str
    setting: str
    cells: Mapping[str, Cell]
    kind: Literal["reference", "undefended", "defense", "defence"] = "defense"


@dataclass(frozen=True)
class Plot:
    """A plot of learning against drift, or against the rise of the margin.

    Attributes:
        x: key of the column for learning.
        y: key of the column for drift.
        path: points (x, y, label) of the undefended update, scaled from none of it to all; may be empty.
    """

    x: str
    y: str
    path: tuple[tuple[float | None, float | None, str], ...] = ()


@dataclass(frozen=True)
class SweepPoint:
    """The undefended adapter projected by SafeLoRA at one threshold.

    Attributes:
        threshold: τ; modules with a cosine of at most τ are projected.
        projected: number of projected modules, mean over seeds.
        modules: number of all modules.
        cells: cells by column key.
    """

    threshold: float
    projected: float
    modules: int
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Failure:
    """A failure that has no cell, because it belongs to a curve.

    Attributes:
        row: name of the run's row.
        seed: seed of the run.
        what: title of what was to be measured; :data:`SWEEP_TITLE` for the whole sweep.
        reason: why there is no value.
    """

    row: str
    seed: int
    what: str
    reason: str


@dataclass(frozen=True)
class ComparisonReport:
    """The complete report of a comparison.

    Attributes:
        title: what was compared on what.
        facts: what a reader needs to interpret the values (model, data, steps, seeds, machine), by label.
        columns: in display order.
        rows: the reference first, then the undefended run, then the defenses.
        plot: None if its columns were not measured.
        sweep: points by ascending threshold; empty if there was no sweep.
        failed: missing parts of the plot's path and of the sweep.
        reading: conclusions from the values, one sentence each.
        complete: False if any requested run or measure is missing.
        margin_plot: the plot of learning against the rise of the margin; None if they were not measured.
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
    margin_plot: Plot | None = None
    format: int = field(default=FORMAT)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; NaN becomes None."""
        content: dict[str, Any] = without_nan(asdict(self))
        return {"format": content.pop("format"), **content}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ComparisonReport:
        """Build a report from the output of :meth:`to_dict`.

        Raises:
            DataError: the content is not a report, or has another format.
        """
        from pydantic import TypeAdapter, ValidationError

        if content.get("format") != FORMAT:
            raise DataError(f"this is not a comparison report of format {FORMAT}")
        try:
            return TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise DataError(f"this comparison report is damaged: {place}: {first['msg']}") from error


def read_report(path: Path) -> ComparisonReport:
    """Read `report.json`.

    Raises:
        DataError: the file cannot be read, or is not a report.
    """
    try:
        return ComparisonReport.from_dict(read_object(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the report {why(error)}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
