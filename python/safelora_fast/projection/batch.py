"""Project adapters in one pass over the checkpoints. Each output is committed, and each adapter fails, by itself."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from safelora_fast import _core
from safelora_fast.checkpoints.adapter import WEIGHTS
from safelora_fast.checkpoints.provenance import sampled
from safelora_fast.checkpoints.resolver import label
from safelora_fast.errors import AdapterError, CheckpointError, OutputError, PairingError, SafeLoraFastError
from safelora_fast.files.output import check_target, whole_folder
from safelora_fast.printable import one_line
from safelora_fast.projection import card
from safelora_fast.projection.copied_tensors import bypass_note, copied_tensors, refuse_bypassing
from safelora_fast.projection.made_from import MARKER
from safelora_fast.projection.module_reports import run_plan
from safelora_fast.projection.report import AdapterReport, ProjectionReport, published
from safelora_fast.projection.serving_limits import serving_notes
from safelora_fast.projection.writer import AdapterWriter, Output
from safelora_fast.projection.written_keys import settled_adapters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from safelora_fast.checkpoints.adapter import Adapter
    from safelora_fast.checkpoints.sources import Checkpoint
    from safelora_fast.projection.jobs import AdapterFactors, Plan, Start, Stream
    from safelora_fast.projection.model_pair import ModelPair
    from safelora_fast.projection.module_reports import Progress
    from safelora_fast.projection.report import ModuleReport
    from safelora_fast.projection.settings import Settings
    from safelora_fast.projection.writer import FactorOutcome

REPORT = "safelora_report.json"


@dataclass(frozen=True)
class Item:
    """An adapter to project.

    Attributes:
        adapter: the adapter, as loaded.
        target: the folder to create, or None to write nothing.
        overwrite: replace the output of an earlier run.
        made_from: the content of the output's MARKER; None writes no marker.
        check: called before the output gets its name. It may raise AdapterError.
    """

    adapter: Adapter
    target: Path | None
    overwrite: bool = False
    made_from: Mapping[str, Any] | None = None
    check: Callable[[], None] | None = None


class _Slot:
    """The output of one adapter during a pass: a temporary folder, the collected modules, and the first failure."""

    def __init__(self, item: Item, adapter: Adapter, output: _Output, folder: contextlib.ExitStack) -> None:
        self.item, self.adapter, self.output, self.folder = item, adapter, output, folder

    def failed(self, error: SafeLoraFastError) -> SafeLoraFastError:
        """Remove the temporary folder, and return the error."""
        self.folder.__exit__(type(error), error, None)
        return error


class _Output(Output):
    """An output that remembers its first failure instead of stopping the other adapters."""

    failure: AdapterError | None = None

    def add(self, report: ModuleReport, factors: AdapterFactors, outcome: FactorOutcome) -> None:
        if self.failure is None:
            try:
                super().add(report, factors, outcome)
            except AdapterError as error:
                self.failure = error


def check_output(item: Item, models: Sequence[Path]) -> None:
    """Raise OutputError if the output of an adapter cannot be written, or must not be replaced.

    Only a folder with a report and without folders in it is replaced: other outputs may lie below it.
    """
    if item.target is None:
        return
    check_target(
        item.target, [item.adapter.path, *models], overwrite=item.overwrite, nbytes=item.adapter.file.size, mark=REPORT
    )
    inner = sorted(path.name for path in item.target.iterdir() if path.is_dir()) if item.target.exists() else []
    if inner:
        raise OutputError(
            f"{item.target}: holds the folder {inner[0]!r}, which would be deleted; choose another output, or move it away"
        )


def project_batch(
    items: Sequence[Item],
    pair: ModelPair,
    settings: Settings,
    *,
    progress: Progress | None = None,
    start: Start | None = None,
    keep_keys: bool = False,
) -> list[ProjectionReport | SafeLoraFastError]:
    """Project adapters in one pass over the checkpoints, and return the report or the error of each.

    A failing adapter leaves no output, and the others are projected without it. If its failure appears while the
    checkpoints are read, the others are read for again.

    Raises:
        CheckpointError: a checkpoint is damaged or quantized.
        OutputError: an output cannot be written, e.g. because the disk is full. Outputs that were committed stay.
    """
    results: dict[int, ProjectionReport | SafeLoraFastError] = {}
    waiting = [list(range(len(items)))]
    while waiting:
        batch = [index for index in waiting.pop() if index not in results]
        if not batch:
            continue
        try:
            plan = pair.plan([items[index].adapter for index in batch])
        except PairingError as error:
            results.update({batch[0]: error} if len(batch) == 1 else _unpaired(items, batch, pair))
            waiting.append(batch)
            continue
        adapters = list(plan.adapters) if keep_keys else settled_adapters(plan, pair.aligned)
        copied = [copied_tensors(adapter, pair.aligned) for adapter in adapters]
        if settings.strict and (refused := _bypassing(batch, adapters, copied)):
            results.update(refused)
            waiting.append(batch)
            continue
        try:
            found = _one_pass(
                [items[index] for index in batch], adapters, copied, plan, pair, settings, progress, start or pair.start
            )
        except (AdapterError, CheckpointError, PairingError) as error:
            place = str(error).startswith
            if any(place(one_line(file.path)) for model in (pair.aligned, pair.base) for file in model.files):
                raise
            guilty = [index for index in batch if place(one_line(items[index].adapter.file.path))]
            if guilty or len(batch) == 1:
                results |= dict.fromkeys(guilty or batch, error)
                waiting.append(batch)
            else:
                waiting += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
        else:
            results.update(zip(batch, found, strict=True))
    return [results[index] for index in range(len(items))]


def _unpaired(items: Sequence[Item], batch: Sequence[int], pair: ModelPair) -> dict[int, SafeLoraFastError]:
    """Return the errors of the adapters that cannot be paired with the checkpoints."""
    found: dict[int, SafeLoraFastError] = {}
    for index in batch:
        try:
            pair.plan([items[index].adapter])
        except PairingError as error:
            found[index] = error
    return found


def _bypassing(
    batch: Sequence[int], adapters: Sequence[Adapter], copied: Sequence[list[dict[str, Any]]]
) -> dict[int, SafeLoraFastError]:
    """Return the errors of the adapters that `strict` refuses."""
    found: dict[int, SafeLoraFastError] = {}
    for index, adapter, tensors in zip(batch, adapters, copied, strict=True):
        try:
            refuse_bypassing(adapter, tensors)
        except AdapterError as error:
            found[index] = error
    return found


def _one_pass(
    items: Sequence[Item],
    adapters: Sequence[Adapter],
    copied: Sequence[list[dict[str, Any]]],
    plan: Plan,
    pair: ModelPair,
    settings: Settings,
    progress: Progress | None,
    start: Start,
) -> list[ProjectionReport | SafeLoraFastError]:
    """Stream the checkpoints once, and commit the outputs one after another."""
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        slots = []
        for index, (item, adapter) in enumerate(zip(items, adapters, strict=True)):
            folder, writer = stack.enter_context(contextlib.ExitStack()), None
            if item.target is not None:
                writer = AdapterWriter(
                    adapter, folder.enter_context(whole_folder(item.target, overwrite=item.overwrite))
                )
            slots.append(_Slot(item, adapter, _Output(index, settings, writer), folder))
        stream = start(plan, settings, keep_projected=any(item.target is not None for item in items))
        run_plan(plan, stream, [slot.output for slot in slots], progress)
        return [
            _settled(slot, tensors, pair, settings, stream, began) for slot, tensors in zip(slots, copied, strict=True)
        ]


def _settled(
    slot: _Slot,
    copied: list[dict[str, Any]],
    pair: ModelPair,
    settings: Settings,
    stream: Stream,
    began: float,
) -> ProjectionReport | SafeLoraFastError:
    """Select the modules of one adapter, write its report and card, and commit its folder."""
    adapter, target = slot.adapter, slot.item.target
    try:
        if slot.output.failure is not None:
            raise slot.output.failure
        modules = slot.output.settled()
        if slot.item.check is not None:
            slot.item.check()
    except AdapterError as error:
        return slot.failed(error)
    trained_on = adapter.config.get("base_model_name_or_path") or None
    notes = [*adapter.notes, *bypass_note(copied), *serving_notes(adapter, copied)]
    output = None if target is None else str(target)
    writer = slot.output.writer
    written = None if writer is None else sampled(writer.folder / WEIGHTS)
    report = ProjectionReport(
        settings=settings.effective(),
        aligned=describe_model(pair.aligned),
        base=describe_model(pair.base),
        adapters=[
            AdapterReport(
                label(adapter.path), output, modules, copied, trained_on, notes, list(adapter.excluded), written
            )
        ],
        bytes_read=stream.nbytes,
        seconds=time.perf_counter() - began,
        versions=versions(),
    )
    if writer is not None:
        _write(writer.folder / REPORT, _json(published(report).to_dict()))
        _write(writer.folder / "README.md", card.render(report, 0))
        if slot.item.made_from is not None:
            _write(writer.folder / MARKER, _json(slot.item.made_from))
    try:
        slot.folder.close()
    except OutputError as error:
        if target is not None and not slot.item.overwrite and (target / REPORT).exists():  # another run was faster
            return error
        raise
    return report


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    """Write text, and escape undecodable bytes of paths as in JSON."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def describe_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a model's part of the report, after its weights were read."""
    return {
        "source": checkpoint.description,
        "revision": checkpoint.revision,
        "files": sorted(file.path for file in checkpoint.files),
        "model_type": (checkpoint.config or {}).get("model_type"),
        "warnings": checkpoint.warnings,
    }


def versions() -> dict[str, str]:
    """Return the versions of the software, for the report."""
    packages = {name: importlib.metadata.version(name) for name in ("safelora-fast", "numpy", "huggingface_hub")}
    return {**packages, "python": platform.python_version(), "kernel": _core.kernel_level()}


def merged(reports: Sequence[ProjectionReport]) -> ProjectionReport:
    """Return one report of adapters that were projected in the same pass."""
    return replace(reports[0], adapters=[adapter for report in reports for adapter in report.adapters])
