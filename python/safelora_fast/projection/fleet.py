"""Project thousands of adapters of one pair of checkpoints, in batches, by any number of independent workers.

An output holds a marker (`safelora_made_from.json`) that says what it was made from. The markers are all that workers
and later runs share: an output whose marker fits is done.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.adapter import load_adapter
from safelora_fast.checkpoints.tensor_names import matching
from safelora_fast.errors import AdapterError, OutputError, SafeLoraFastError, SettingsError, StoreError
from safelora_fast.files.argument_checks import check_path, whole_number
from safelora_fast.files.output import abandoned, leftovers_note, temporary_folder
from safelora_fast.files.progress import bar_on_a_terminal, log_warning
from safelora_fast.files.remote import is_url
from safelora_fast.files.store import changes_text
from safelora_fast.printable import counted
from safelora_fast.projection.batch import Item, project_batch
from safelora_fast.projection.fleet_places import Places
from safelora_fast.projection.fleet_shard import Shard, parse_shard
from safelora_fast.projection.made_from import STAMP, adapter_digest, differences, made_from
from safelora_fast.projection.manifest import Row, read_manifest
from safelora_fast.projection.model_pair import ModelPair, Vectors, local_models, open_pair, settings_and_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from safelora_fast.projection.settings import Settings


BATCH = 16
LISTED_AT_ONCE = 64  # the list is rewritten as a whole


@dataclass
class FleetReport:
    """What a worker did with its shard.

    Attributes:
        projected: number of adapters that were projected.
        skipped: number of adapters whose output was there.
        failed: the error of each failed adapter, by id.
        passes: how often V was read; once per batch, and once more where a batch had a damaged adapter.
        bytes_read: bytes of both checkpoints that were read.
        shard: the shard.
        seconds: how long it took.
    """

    projected: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    passes: int = 0
    bytes_read: int = 0
    shard: Shard = field(default_factory=Shard)
    seconds: float = 0.0

    def __str__(self) -> str:
        from rich.filesize import decimal

        whole = "" if self.shard.count == 1 else f"shard {self.shard}: "
        failed = f", {len(self.failed)} failed (see {self.shard.failures})" if self.failed else ""
        return (
            f"{whole}{counted(self.projected, 'adapter')} projected, {self.skipped} there already{failed}; "
            f"{self.passes} {'pass' if self.passes == 1 else 'passes'} over V, {decimal(self.bytes_read)}, in {self.seconds:.1f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "shard": str(self.shard)}


def project_fleet(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    aligned: str | Path | None = None,
    base: str | Path | None = None,
    output: str | Path,
    subspace: Vectors | None = None,
    shard: str | None = "0/1",
    batch: int = BATCH,
    overwrite: bool = False,
    progress: Any = None,
    warn: Callable[[str], None] | None = None,
    **settings: Any,
) -> FleetReport:
    """Project many adapters of one pair of checkpoints; see :func:`~safelora_fast.project_adapter` for one.

    Each output is committed by itself, with a marker that says what it was made from: adapter, pair, and settings.
    Outputs with such a marker are skipped, so a run that was killed or that other workers share goes on where they are.
    The outputs of a batch become visible at its end, so a killed worker loses at most the batch in hand. A faulty
    adapter is a row of `failed.jsonl` (with several shards `failed-I-of-N.jsonl`) in `output`, and the others go on.

    Args:
        source: a JSONL file with an object `{"id", "adapter", "output"?, "revision"?}` per line, a folder with adapters
            below it, or an iterable of such objects. An id is a relative path. Lists, adapters and outputs may be URLs
            (`s3://`, `gs://`, `hf://`); the adapters and outputs of one batch are then kept in a temporary folder.
        aligned: path or Hub id (optionally with `@revision`) of the model that the adapters were trained on.
        base: path or Hub id of the model before alignment.
        output: the folder for outputs: each goes to the subfolder named by its id, unless its row says otherwise.
        subspace: a :class:`~safelora_fast.SafeSubspace` instead of `aligned` and `base`, for operator "orthogonal" and
            select "all".
        shard: "I/N" projects the adapters at positions I, I + N, … of the list, with I from 0. "/N" and None read the
            rest from the variables of Slurm arrays, indexed jobs of Kubernetes, torchrun, or SkyPilot.
        batch: the number of adapters that are projected in one pass over the checkpoints. Memory grows with it.
        overwrite: replace the outputs of this shard that were made from something else. Others are never touched.
        progress: None shows a bar if standard error is a terminal, False shows nothing.
        warn: called with each warning and failure, one line of text; by default, they are logged.
        **settings: `operator`, `select`, `strict`, … of :func:`~safelora_fast.project_adapter`.

    Raises:
        DataError: the list is invalid.
        SettingsError: a setting or the shard is invalid.
        CheckpointError, PairingError: a checkpoint cannot be read, or the two are equal.
        OutputError: an output cannot be written, or would touch another one or an input. What was committed stays.
        StoreError: a remote store failed. What was committed stays.
    """
    began = time.perf_counter()
    chosen, pair = settings_and_pair(subspace, aligned, base, settings)
    check_path("output", output, "the folder for outputs")
    if whole_number("batch", batch) < 1:
        raise SettingsError(f"batch must be at least 1, not {batch}")
    local = local_models(aligned, base) if pair is None else []
    report = FleetReport(shard=parse_shard(shard))
    rows = read_manifest(source, output, local)[report.shard.index :: report.shard.count]
    pair = pair or open_pair(aligned, base)
    with temporary_folder("safelora-fast-fleet") as (cache, left), bar_on_a_terminal(progress) as bar:
        places = Places(output, report.shard.failures, cache)
        run = _Run(chosen, pair, local, overwrite, places, report, warn or log_warning)
        beside = abandoned(*(Path(row.output) for row in rows if not is_url(row.output)))
        for warning in leftovers_note([*left, *beside]):
            run.warn(warning)
        if bar is not None:
            bar.start("adapters", len(rows), 0)
        for done in run.work(rows, batch):
            if bar is not None:
                bar.advance(done)
        run.check_exclude()
    report.seconds = time.perf_counter() - began
    return report


class _Run:
    """The state of one worker."""

    def __init__(
        self,
        settings: Settings,
        pair: ModelPair,
        local: Sequence[Path],
        overwrite: bool,
        places: Places,
        report: FleetReport,
        warn: Callable[[str], None],
    ) -> None:
        self.settings, self.pair, self.local, self.overwrite = settings, pair, local, overwrite
        self.places, self.report, self.warn = places, report, warn
        self.of_pair: set[str] = set()
        self.unused = set(settings.exclude)
        self.identity = pair.identity()
        self.listed = 0  # failures in the list

    def work(self, rows: Sequence[Row], size: int) -> Iterator[int]:
        """Project all rows. Yield after each batch how many rows are settled."""
        self.places.list_failures({})
        batch: list[tuple[Row, Item]] = []
        for number, row in enumerate(rows, start=1):
            try:
                item = self.prepared(row)
            except StoreError:
                raise
            except SafeLoraFastError as error:
                self.fail(row, error)
                self.places.forget(row)
            else:
                if item is None:
                    self.report.skipped += 1
                    self.places.forget(row)
                else:
                    batch.append((row, item))
            if batch and (len(batch) == size or number == len(rows)):
                self.project(batch)
                for done, _ in batch:
                    self.places.forget(done)
                batch.clear()
            if not batch or len(self.report.failed) >= self.listed + LISTED_AT_ONCE:
                self.list_failures()
            yield number - len(batch)

    def prepared(self, row: Row) -> Item | None:
        """Load an adapter and check its output; None if the output is there already.

        Raises:
            SafeLoraFastError: the adapter cannot be projected, or its output must not be written.
        """
        former, stamp = self.places.marker(row), self.places.stamp(row)
        known = former.get("adapter") if former and stamp and former.get(STAMP) == stamp else None
        folder = None if known else self.places.fetched(row)
        content = str(known) if folder is None else adapter_digest(folder)
        document = made_from(self.identity, self.settings, content, stamp)
        changed = None if former is None else differences(former, document)
        if changed == {}:
            return None
        if former and changed and not self.overwrite:
            raise OutputError(
                f"{row.output}: was made from something else ({changes_text(changed)}); pass --overwrite to replace it"
            )
        folder = folder or self.places.fetched(row)
        adapter = load_adapter(folder, self.settings.exclude)
        self.unused -= {pattern for pattern in self.unused if any(matching(one, [pattern]) for one in adapter.excluded)}

        def unchanged() -> None:
            if adapter_digest(folder) != content:
                raise AdapterError(f"{folder}: changed while it was read; project it again")

        item = Item(adapter, self.places.target(row), self.overwrite, document, unchanged)
        self.places.check(row, item, self.local, foreign=former is None)
        return item

    def project(self, batch: Sequence[tuple[Row, Item]]) -> None:
        """Project a batch, count its results, and pass on their warnings; those about the pair once."""
        passes = _Passes(self.report)
        found = project_batch([item for _, item in batch], self.pair, self.settings, progress=passes)
        for (row, item), result in zip(batch, found, strict=True):
            if isinstance(result, SafeLoraFastError):
                former = self.places.marker(row) if isinstance(result, OutputError) else None
                if former and differences(former, item.made_from or {}) == {}:
                    self.report.skipped += 1  # another worker was faster
                else:
                    self.fail(row, result)
                continue
            try:
                self.places.commit(row, item)
            except OutputError as error:
                self.fail(row, error)
                continue
            self.report.projected += 1
            for warning in result.warnings:
                if warning not in self.of_pair:
                    self.warn(self.places.shown(warning))
            self.of_pair |= set(replace(result, adapters=[]).warnings)

    def fail(self, row: Row, error: SafeLoraFastError) -> None:
        """Count a failure, and pass it on."""
        self.report.failed[row.id] = self.places.shown(str(error))
        self.warn(f"{row.id} failed: {self.report.failed[row.id]}")

    def list_failures(self) -> None:
        """Rewrite the list of failures, if there are new ones."""
        if len(self.report.failed) > self.listed:
            self.places.list_failures(self.report.failed)
            self.listed = len(self.report.failed)

    def check_exclude(self) -> None:
        """Warn about patterns that matched no module of any adapter."""
        for pattern in sorted(self.unused if self.report.projected else ()):
            self.warn(f"exclude: no adapted module of any adapter is called {pattern!r}")


class _Passes:
    """Counts the passes over V, and the bytes."""

    def __init__(self, report: FleetReport) -> None:
        self.report, self.done = report, 0

    def start(self, total_bytes: int, modules: int) -> None:
        del total_bytes, modules
        self.report.passes += 1
        self.done = 0

    def advance(self, done_bytes: int, module: str) -> None:
        del module
        self.report.bytes_read += done_bytes - self.done
        self.done = done_bytes
