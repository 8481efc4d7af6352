"""What a comparison found, as plain values: the content of `report.json`, and all that a page or a text is made from.

A report knows nothing of how its figures came about, so that whoever has figures can make one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from safelora_fast.errors import DataError

if TYPE_CHECKING:
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
        content: dict[str, Any] = _plain(asdict(self))
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
            plot = content["plot"]
            return cls(
                title=content["title"],
                facts=dict(content["facts"]),
                columns=tuple(Column(**column) for column in content["columns"]),
                rows=tuple(Row(**{**row, "cells": _cells(row["cells"])}) for row in content["rows"]),
                plot=None if plot is None else Plot(plot["x"], plot["y"], tuple(map(tuple, plot["path"]))),
                sweep=tuple(SweepPoint(**{**point, "cells": _cells(point["cells"])}) for point in content["sweep"]),
                failed=tuple(Failure(**one) for one in content.get("failed", ())),
                reading=tuple(content["reading"]),
                complete=content["complete"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"this comparison report is damaged: {error!r}") from error


def is_pending(reason: str | None) -> bool:
    """Whether a reason for want of a figure says that nothing has been done yet."""
    return reason is not None and reason.endswith(PENDING)


def read_report(path: Path) -> ComparisonReport:
    """Read `report.json`.

    Raises:
        DataError: it cannot be read, or is no report.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the report cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: is no comparison report")
    try:
        return ComparisonReport.from_dict(content)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _cells(content: Mapping[str, Any]) -> dict[str, Cell]:
    return {
        key: Cell(**{**cell, "seeds": tuple(SeedValue(**seed) for seed in cell["seeds"])})
        for key, cell in content.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
