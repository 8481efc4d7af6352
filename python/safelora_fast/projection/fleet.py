"""Project thousands of adapters of one pair of checkpoints, in batches, by any number of independent workers.

An output holds a marker (`safelora_made_from.json`) that says what it was made from. The markers are all that workers
and later runs share: an output whose marker fits is done.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.adapter import load_adapter
from safelora_fast.checkpoints.resolver import adapter_folder
from safelora_fast.checkpoints.tensor_names import matching
from safelora_fast.errors import AdapterError, OutputError, SafeLoraFastError, SettingsError
from safelora_fast.files.argument_checks import check_path, whole_number
from safelora_fast.files.json_reader import read_object
from safelora_fast.files.output import described, whole_file
from safelora_fast.files.progress import bar_on_a_terminal, log_warning
from safelora_fast.files.store import changes_text
from safelora_fast.printable import counted
from safelora_fast.projection.batch import Item, check_output, project_batch
from safelora_fast.projection.fleet_shard import Shard, parse_shard
from safelora_fast.projection.made_from import MARKER, adapter_digest, differences, made_from
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
            below it, or an iterable of such objects. An id is a relative path.
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
    """
    began = time.perf_counter()
    chosen, pair = settings_and_pair(subspace, aligned, base, settings)
    check_path("output", output, "the folder for outputs")
    if whole_number("batch", batch) < 1:
        raise SettingsError(f"batch must be at least 1, not {batch}")
    local = local_models(aligned, base) if pair is None else []
    report = FleetReport(shard=parse_shard(shard))
    rows = read_manifest(source, output, local)[report.shard.index :: report.shard.count]
    run = _Run(
        chosen,
        pair or open_pair(aligned, base),
        local,
        overwrite,
        Path(output, report.shard.failures),
        report,
        warn or log_warning,
    )
    with bar_on_a_terminal(progress) as bar:
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
        failures: Path,
        report: FleetReport,
        warn: Callable[[str], None],
    ) -> None:
        self.settings, self.pair, self.local, self.overwrite = settings, pair, local, overwrite
        self.failures, self.report, self.warn = failures, report, warn
        self.of_pair: set[str] = set()
        self.unused = set(settings.exclude)
        self.identity = pair.identity()
        self.listed = 0  # failures in the list

    def work(self, rows: Sequence[Row], size: int) -> Iterator[int]:
        """Project all rows. Yield after each batch how many rows are settled."""
        with described(self.failures):
            self.failures.unlink(missing_ok=True)
        batch: list[tuple[Row, Item]] = []
        for number, row in enumerate(rows, start=1):
            try:
                item = self.prepared(row)
            except SafeLoraFastError as error:
                self.fail(row, error)
            else:
                if item is None:
                    self.report.skipped += 1
                else:
                    batch.append((row, item))
            if batch and (len(batch) == size or number == len(rows)):
                self.project(batch)
                batch.clear()
            if not batch or len(self.report.failed) >= self.listed + LISTED_AT_ONCE:
                self.list_failures()
            yield number - len(batch)

    def prepared(self, row: Row) -> Item | None:
        """Load an adapter and check its output; None if the output is there already.

        Raises:
            SafeLoraFastError: the adapter cannot be projected, or its output must not be written.
        """
        folder, target = adapter_folder(row.adapter), Path(row.output)
        content = adapter_digest(folder)
        document = made_from(self.identity, self.settings, content)
        if (changed := _changed(target, document)) == {}:
            return None
        if changed and not self.overwrite:
            raise OutputError(
                f"{target}: was made from something else ({changes_text(changed)}); pass --overwrite to replace it"
            )
        adapter = load_adapter(folder, self.settings.exclude)
        self.unused -= {pattern for pattern in self.unused if any(matching(one, [pattern]) for one in adapter.excluded)}

        def unchanged() -> None:
            if adapter_digest(folder) != content:
                raise AdapterError(f"{folder}: changed while it was read; project it again")

        item = Item(adapter, target, self.overwrite, document, unchanged)
        check_output(item, self.local)
        return item

    def project(self, batch: Sequence[tuple[Row, Item]]) -> None:
        """Project a batch, count its results, and pass on their warnings; those about the pair once."""
        passes = _Passes(self.report)
        found = project_batch([item for _, item in batch], self.pair, self.settings, progress=passes)
        for (row, item), result in zip(batch, found, strict=True):
            if not isinstance(result, SafeLoraFastError):
                self.report.projected += 1
                of_pair = set(replace(result, adapters=[]).warnings)
                for warning in result.warnings:
                    if warning not in self.of_pair:
                        self.warn(warning)
                self.of_pair |= of_pair
            elif isinstance(result, OutputError) and _changed(Path(row.output), item.made_from or {}) == {}:
                self.report.skipped += 1  # another worker was faster
            else:
                self.fail(row, result)

    def fail(self, row: Row, error: SafeLoraFastError) -> None:
        """Count a failure, and pass it on."""
        self.report.failed[row.id] = str(error)
        self.warn(f"{row.id} failed: {error}")

    def list_failures(self) -> None:
        """Rewrite the list of failures, if there are new ones."""
        if len(self.report.failed) > self.listed:
            lines = ({"id": name, "error": text} for name, text in self.report.failed.items())
            with whole_file(self.failures) as file:
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                file.write_text(text, encoding="utf-8", errors="backslashreplace")
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


def _changed(target: Path, document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what differs between an output's marker and a document; None if the output has no marker."""
    try:
        former = read_object(target / MARKER)
    except OSError:
        return None
    except ValueError:
        former = {}
    return differences(former, document)
