"""What a comparison found, as plain values: the content of `report.json`, and all that a page or a text is made from.

A report knows nothing of how its figures came about, so that whoever has figures can make one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from safelora_fast.errors import DataError
from safelora_fast.files.json_reader import (
    COUNT,
    FLAG,
    LIST,
    NUMBER,
    OBJECT,
    TEXT,
    TEXTS,
    check_fields,
    read_object,
    why,
)
from safelora_fast.files.store import without_nan

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Criterion = Literal["aligned", "benign", "narrow", "coherent", "cost"]
FORMAT = 1
SWEEP_TITLE = "SafeLoRA by threshold"
# What a provider must see of each defence (Kaczér et al., arXiv 2508.06249, section 3), and what it costs.
CRITERIA: dict[Criterion, str] = {
    "aligned": "no emergent misalignment",
    "benign": "benign tasks still learned",
    "narrow": "narrow behaviour still learnable",
    "coherent": "coherent answers",
    "cost": "cost",
}

WHOLE = {
    "title": TEXT, "facts": OBJECT, "columns": LIST, "rows": LIST, "sweep": LIST, "reading": TEXTS, "complete": FLAG,
}  # fmt: skip
COLUMN = dict.fromkeys(("key", "criterion", "title", "unit", "note"), TEXT)
ROW = {"name": TEXT, "setting": TEXT, "kind": TEXT, "cells": OBJECT}
PLOT = {"x": TEXT, "y": TEXT, "path": LIST}
POINT = {"threshold": NUMBER, "projected": NUMBER, "modules": COUNT, "cells": OBJECT}
FAILED = {"row": TEXT, "seed": COUNT, "what": TEXT, "reason": TEXT}
SEED = {"value": NUMBER, "failure": TEXT}

NOT_TRAINED, NOT_MEASURED = PENDING = "not trained yet", "not measured yet"


@dataclass(frozen=True)
class Column:
    """One measure.

    Attributes:
        key: its name in files.
        criterion: what it speaks to, a key of :data:`CRITERIA`.
        title: its name for people, short.
        unit: "%" for shares (values are shares of 1), "nats", "s", "GB", "×" or "".
        better: which way is good; None where neither is.
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
    """What one run came to; the value is None where it failed.

    Attributes:
        seed: of the run.
        value: its figure.
        source: the file that it came from, relative to the report.
        failure: why there is none.
    """

    seed: int
    value: float | None
    source: str
    failure: str | None = None

    @property
    def pending(self) -> bool:
        """Whether there is no figure because nothing has been done yet, for this run or for what it is held against."""
        return is_pending(self.failure)


@dataclass(frozen=True)
class Cell:
    """A defence by a measure.

    Attributes:
        value: mean over the seeds that have one; None where none has.
        low, high: ends of the 95 % interval; None where there is none.
        seeds: one by one.
        count: what the figure is a share of, in words ("12 of 240 scored, 3 unscored").
    """

    value: float | None
    low: float | None
    high: float | None
    seeds: tuple[SeedValue, ...]
    count: str = ""

    @property
    def failures(self) -> list[SeedValue]:
        """The runs without a figure, those that are not done yet among them."""
        return [seed for seed in self.seeds if seed.failure is not None]


@dataclass(frozen=True)
class Row:
    """A defence, or the reference.

    Attributes:
        name: as the configuration has it.
        setting: its weights, in words.
        cells: by the column's key; a measure that was not asked for has none.
        kind: "reference" (before the fine-tune), "undefended" or "defence".
    """

    name: str
    setting: str
    cells: Mapping[str, Cell]
    kind: Literal["reference", "undefended", "defence"] = "defence"


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
    path: tuple[tuple[float, float, str], ...] = ()


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
    """What failed and has no cell, because it is a part of a curve.

    Attributes:
        row: name of the row whose run it is.
        seed: of the run.
        what: was to be measured; :data:`SWEEP_TITLE` for the sweep as a whole.
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
        facts: what a reader must know to read the figures (model, data, steps, seeds, machine), by label.
        columns: in the order in which they are shown.
        rows: the reference first, then the undefended run, then the defences.
        plot: None where its columns were not measured.
        sweep: by threshold, rising; empty where there was none.
        failed: what is missing in the plot's path and in the sweep.
        reading: sentences that follow from the figures.
        complete: False while runs or measures are missing that were asked for.
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
        if content.get("format") != FORMAT:
            raise DataError(f"this is no comparison report of format {FORMAT}")
        try:
            check_fields(content, WHOLE, {"plot": OBJECT, "failed": LIST})
            check_fields(content["facts"], {}, dict.fromkeys(content["facts"], TEXT))
            plot = content.get("plot")
            return cls(
                title=content["title"],
                facts=dict(content["facts"]),
                columns=tuple(
                    Column(**check_fields(column, COLUMN, {"better": TEXT})) for column in content["columns"]
                ),
                rows=tuple(Row(**_with_cells(check_fields(row, ROW))) for row in content["rows"]),
                plot=None if plot is None else _plot(check_fields(plot, PLOT)),
                sweep=tuple(SweepPoint(**_with_cells(check_fields(point, POINT))) for point in content["sweep"]),
                failed=tuple(Failure(**check_fields(one, FAILED)) for one in content.get("failed") or ()),
                reading=tuple(content["reading"]),
                complete=content["complete"],
            )
        except (ValueError, TypeError) as error:  # TypeError: a name that is not known
            raise DataError(f"this comparison report is damaged: {error}") from error


def is_pending(reason: str | None) -> bool:
    """Whether a reason for want of a figure says that nothing has been done yet."""
    return reason is not None and reason.endswith(PENDING)


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


def _with_cells(content: Mapping[str, Any]) -> dict[str, Any]:
    """A row or a point of the sweep, whose cells are objects now."""
    cells = {}
    for key, cell in content["cells"].items():
        check_fields(cell, {"seeds": LIST, "count": TEXT}, dict.fromkeys(("value", "low", "high"), NUMBER))
        seeds = [check_fields(seed, {"seed": COUNT, "source": TEXT}, SEED) for seed in cell["seeds"]]
        cells[key] = Cell(**{**cell, "seeds": tuple(SeedValue(**seed) for seed in seeds)})
    return {**content, "cells": cells}


def _plot(content: Mapping[str, Any]) -> Plot:
    for point in content["path"]:
        if not (isinstance(point, list) and len(point) == 3 and isinstance(point[2], str)):
            raise ValueError("a point of the plot's path must be two numbers and a text")
        check_fields(dict(enumerate(point[:2])), {}, {0: NUMBER, 1: NUMBER})  # type: ignore[dict-item]
    return Plot(content["x"], content["y"], tuple(map(tuple, content["path"])))
