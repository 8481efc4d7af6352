"""Reader of a screen's report: it is about the training data, so it must be of the file that the subject was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_fast.errors import DataError
from safelora_fast.files.digest import digest
from safelora_fast.files.json_reader import COUNT, LIST, NUMBER, OBJECT, TEXT, check_fields, of_kind
from safelora_fast.gate.result_reader import Reader, Reading, Subject, interval_of, item_of, stored_object
from safelora_fast.recipe.run_folder import RECORD, read_record

if TYPE_CHECKING:
    from pathlib import Path

    from safelora_fast.gate.criterion import Criterion

FLAGGED, MEAN = "flagged", "mean"


class ScreenReader(Reader):
    """Values of `screen`: NAME.flagged (the share of examples above the screen's limit) or NAME.mean, of a trait, gap or nll."""

    name, path, own_keys = "screen", "screen.json", ("data", "most_unscored")

    def is_share(self, criterion: Criterion) -> bool:
        """Return whether the metric is the share of flagged examples."""
        return str(criterion.metric).endswith(f".{FLAGGED}")

    def read(self, path: Path, criterion: Criterion, subject: Subject) -> Reading:
        """Return the value. The share of flagged examples has no sampling error, for it is of the whole file."""
        kinds = {"sha256": TEXT, "examples": COUNT, "measures": OBJECT, "skipped": OBJECT}
        report = check_fields(stored_object(path), kinds)
        _check_data(report["sha256"], subject, path)
        name, _, what = str(criterion.metric).rpartition(".")
        measure = item_of(report["measures"], name, "measure (NAME.flagged or NAME.mean)", path)
        check_fields(measure, {"count": COUNT, "flagged": COUNT, "mean": NUMBER, "interval": LIST}, {"limit": NUMBER})
        count, examples = measure["count"], report["examples"]
        if not 0 < count <= examples or measure["flagged"] > count:
            raise DataError(f"{path}: is damaged: {measure['flagged']} of {count} of {examples} examples are flagged")
        flagged = {} if measure.get("limit") is None else {FLAGGED: measure["flagged"] / count}
        if what == FLAGGED and not flagged:
            raise DataError(f"{path}: {name} had no limit; screen again with --limit {name}=VALUE")
        value = item_of({**flagged, MEAN: measure["mean"]}, what, "metric", path)
        interval = interval_of(measure["interval"]) if what == MEAN else None
        words = f"{measure['flagged']} of {count} examples" if what == FLAGGED else f"{count} examples"
        return Reading(value, interval, exact=what == FLAGGED, unscored=1 - count / examples, count=words)


def _check_data(sha256: str, subject: Subject, path: Path) -> None:
    """Raise DataError unless the screened file is the subject's training data."""
    record = subject.folder / RECORD
    trained = of_kind((read_record(record).get("data") or {}).get("train"), TEXT, "train") if record.is_file() else None
    if trained is None and subject.data is None:
        raise DataError(
            f"{path}: {subject.folder} has no {RECORD} that says what it was trained on; set data: to the file"
        )
    named = None if subject.data is None else digest(subject.data)
    if sha256 != (trained or named) or sha256 != (named or trained):
        raise DataError(f"{path}: is stale: made of another file than the subject's training data; screen that")
