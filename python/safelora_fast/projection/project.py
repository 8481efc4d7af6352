"""Project finished adapters: plan, stream, select, write, report."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safelora_fast import _core
from safelora_fast.checkpoints.adapter import WEIGHTS, Adapter, load_adapters
from safelora_fast.checkpoints.resolver import folder_name, label
from safelora_fast.checkpoints.sources import A_MODEL, Checkpoint, open_checkpoint, same_place
from safelora_fast.checkpoints.weight_norms import weight_norm
from safelora_fast.errors import AdapterError, SettingsError
from safelora_fast.files.argument_checks import check_path
from safelora_fast.files.output import check_target, whole_folder
from safelora_fast.files.progress import bar_on_a_terminal, log_warnings
from safelora_fast.projection import card
from safelora_fast.projection.bypass import bypass_note, copied_tensors, refuse_bypassing
from safelora_fast.projection.jobs import refuse_equal, start_stream
from safelora_fast.projection.plan import plan_projection
from safelora_fast.projection.report import AdapterReport, ModuleReport, ProjectionReport, published
from safelora_fast.projection.settings import Settings, chosen
from safelora_fast.projection.writer import AdapterWriter
from safelora_fast.projection.written_keys import settled_adapters

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from safelora_fast.projection.jobs import Plan, Start, Target

REPORT = "safelora_report.json"
PathLike = str | Path


class Progress(Protocol):
    """Told once what there is to do, then after every module how far the run is."""

    def start(self, total_bytes: int, modules: int) -> None:
        """Called before the first byte is read."""

    def advance(self, done_bytes: int, module: str) -> None:
        """Called after each module with the bytes done so far."""


def project_adapter(
    adapter: PathLike | Sequence[PathLike],
    *,
    aligned: PathLike,
    base: PathLike,
    output: PathLike | None,
    operator: str = "safelora",
    normalize: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    select: str = "threshold",
    threshold: float | None = None,
    num_layers: int | None = None,
    threads: int | None = None,
    exclude: str | Sequence[str] | None = None,
    strict: bool = False,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
) -> ProjectionReport:
    """Project one or several PEFT adapters with SafeLoRA (Hsu et al. 2024, arXiv 2405.16833) and write the results.

    The checkpoints are streamed once, whatever the number of adapters; no model is loaded. Inputs are never written. The
    output appears under its name only when it is whole. docs/methods.md defines operators and selection.

    Args:
        adapter: folder of a PEFT LoRA adapter or its Hub id, with `@revision` if need be; or several of them.
        aligned: the model that the adapter was trained on: path or Hub id, with `@revision` if need be.
        base: the model before alignment.
        output: the folder to make; with several adapters it gets one sub-folder each, named as theirs. None writes nothing.
        operator: what selected modules become: "safelora" (C = V·Vᵀ/‖V‖_F), "orthogonal" (U_k·U_kᵀ) or "zero".
        normalize: "frobenius" (default, the paper's) or "spectral"; for safelora.
        rank: columns of U_k; for orthogonal.
        energy: share of ‖V‖²_F that U_k must hold; for orthogonal, instead of rank.
        select: "threshold" (cosine ≤ threshold), "number" (the lowest cosines) or "all".
        threshold: 0.5 where not given.
        num_layers: 10 where not given.
        threads: number of threads; all cores by default. The result does not depend on it.
        exclude: names or patterns ("lm_head", "layers.0.*") of modules that stay as they are; the report names them.
        strict: refuse adapters with trained tensors that are not LoRA factors (modules_to_save, biases, embeddings, norms).
        overwrite: replace an output folder that exists.
        progress: told about every module; None shows a bar where standard error is a terminal, False nothing.

    Returns:
        What was done, as it is also written to `safelora_report.json`.

    Raises:
        SafeLoraFastError: any bad input, in one line; nothing is written then.
    """
    chosen_settings = (operator, normalize, rank, energy, select, threshold, num_layers, threads, exclude, strict)
    settings = Settings(*chosen_settings)  # type: ignore[arg-type]
    with bar_on_a_terminal(progress) as told:
        report = project_folders(
            adapter, settings, aligned=aligned, base=base, output=output, overwrite=overwrite, progress=told
        )
    log_warnings(report.warnings)
    return report


def project_folders(
    adapter: PathLike | Sequence[PathLike],
    settings: Settings,
    *,
    aligned: PathLike,
    base: PathLike,
    output: PathLike | None,
    overwrite: bool = False,
    progress: Progress | None = None,
    start: Start = start_stream,
    keep_keys: bool = False,
) -> ProjectionReport:
    """What :func:`project_adapter` does, with checked settings, by the extension or by whatever else `start` starts.

    With `keep_keys` the adapters are of a model at hand: their keys are written as they are.
    """
    paths = _paths(adapter)
    for role, model in {"aligned": aligned, "base": base}.items():
        check_path(role, model, A_MODEL)
    if output is not None:
        check_path("output", output, "the folder to make, or None")
    began = time.perf_counter()
    adapters = load_adapters(paths, settings.exclude, keep_keys=keep_keys)
    folders = _folders(adapters, None if output is None else Path(output))
    if output is not None:
        inputs = [adapter.path for adapter in adapters] + [path for path in map(Path, (aligned, base)) if path.exists()]
        size = sum(adapter.file.size for adapter in adapters)
        check_target(Path(output), inputs, overwrite=overwrite, nbytes=size, mark=REPORT)
    models = open_checkpoint(aligned, role="aligned"), open_checkpoint(base, role="base")
    if same_place(*models):
        refuse_equal([0.0])
    plan = plan_projection(adapters, *models)
    if not keep_keys:
        adapters = settled_adapters(plan, models[0])
    copied = [copied_tensors(adapter, models[0]) for adapter in adapters]
    if settings.strict:
        for one, tensors in zip(adapters, copied, strict=True):
            refuse_bypassing(one, tensors)

    whole: AbstractContextManager[Path | None] = (
        contextlib.nullcontext() if output is None else whole_folder(Path(output), overwrite=overwrite)
    )
    with whole as partial:
        writers: list[AdapterWriter | None] = [None] * len(adapters)
        if partial is not None and output is not None:
            places = [partial / folder.relative_to(output) for folder in folders if folder is not None]
            writers = [AdapterWriter(adapter, place) for adapter, place in zip(adapters, places, strict=True)]
        modules, bytes_read = _run(plan, settings, writers, progress, start)
        report = ProjectionReport(
            settings=settings.effective(),
            aligned=_describe(models[0]),
            base=_describe(models[1]),
            adapters=[
                AdapterReport(
                    label(adapter.path),
                    None if folder is None else str(folder),
                    reports,
                    tensors,
                    adapter.config.get("base_model_name_or_path") or None,
                    [*adapter.notes, *bypass_note(tensors)],
                    list(adapter.excluded),
                )
                for adapter, folder, reports, tensors in zip(adapters, folders, modules, copied, strict=True)
            ],
            bytes_read=bytes_read,
            seconds=time.perf_counter() - began,
            versions=_versions(),
        )
        for index, writer in enumerate(writers):
            if writer is not None:
                text = json.dumps(
                    published(replace(report, adapters=[report.adapters[index]])).to_dict(),
                    indent=2,
                    ensure_ascii=False,
                )
                _write(writer.folder / REPORT, text + "\n")
                _write(writer.folder / "README.md", card.render(report, index))
    return report


def _run(
    plan: Plan,
    settings: Settings,
    writers: Sequence[AdapterWriter | None],
    progress: Progress | None,
    start: Start,
) -> tuple[list[list[ModuleReport]], int]:
    """Stream the modules, write what may be selected, and settle the selection at the end; also the bytes read."""
    reports: list[list[ModuleReport]] = [[] for _ in writers]
    targets: list[list[tuple[Target, AdapterError | None]]] = [[] for _ in writers]
    stream = start(plan, settings, keep_projected=any(writer is not None for writer in writers))
    if progress is not None:
        progress.start(stream.nbytes, len(plan.modules))
    try:
        for outcome in stream:
            planned = plan.modules[outcome.index]
            norm = weight_norm(planned.group.aligned)
            for target, factor in zip(planned.targets, outcome.factors, strict=True):
                report = ModuleReport(
                    name=planned.name,
                    cosine=factor.cosine,
                    projected=False,
                    reason="",
                    gain=factor.gain,
                    rank=target.cols,
                    b_norm=factor.lora_b_norm,
                    b_norm_after=factor.lora_b_norm_projected,
                    update_norm=factor.update_norm,
                    update_norm_after=factor.update_norm_projected,
                    v_norm=outcome.v_norm,
                    v_rank=outcome.rank,
                    v_energy=outcome.energy,
                    sources=[asdict(source) for source in planned.sources],
                    v_ratio=outcome.v_norm / norm if norm else math.nan,
                )
                reports[target.adapter].append(report)
                writer, failure = writers[target.adapter], None
                if writer is not None and chosen({report.name: report.cosine}, settings):
                    try:
                        writer.write(target, factor.projected())
                    except AdapterError as error:
                        failure = error  # of a module that may not be selected in the end
                        if settings.select != "number":
                            raise
                targets[target.adapter].append((target, failure))
            if progress is not None:
                progress.advance(stream.bytes_done, planned.name)
    finally:
        stream.close()
    refuse_equal([report.v_norm for adapter_reports in reports for report in adapter_reports])
    settled = [
        _settle(adapter_reports, adapter_targets, writer, settings)
        for adapter_reports, adapter_targets, writer in zip(reports, targets, writers, strict=True)
    ]
    return settled, stream.nbytes


def _settle(
    reports: list[ModuleReport],
    targets: list[tuple[Target, AdapterError | None]],
    writer: AdapterWriter | None,
    settings: Settings,
) -> list[ModuleReport]:
    """Mark the selected modules and put back the others."""
    selected = chosen({report.name: report.cosine for report in reports}, settings)
    settled = []
    for report, (target, failure) in zip(reports, targets, strict=True):
        projected = report.name in selected
        if projected:
            if failure is not None:
                raise failure
            settled.append(replace(report, projected=True, reason=settings.why(report.cosine, projected=True)))
            continue
        if writer is not None:
            writer.restore(target)
        reason = settings.why(report.cosine, projected=False)
        if report.v_norm == 0:
            reason = "V is zero: aligned and base agree here"
        elif report.update_norm == 0:
            reason = "the update is zero"
        settled.append(replace(report, reason=reason, b_norm_after=report.b_norm, update_norm_after=report.update_norm))
    return settled


def _paths(adapter: PathLike | Sequence[PathLike]) -> list[PathLike]:
    paths = [adapter] if isinstance(adapter, str | bytes | Path) or not isinstance(adapter, Iterable) else list(adapter)
    if not paths:
        raise SettingsError("no adapter was given")
    for path in paths:
        check_path("adapter", path, "the folder of a PEFT adapter, or several")
    return paths


def _folders(adapters: Sequence[Adapter], output: Path | None) -> list[Path | None]:
    """Where each adapter goes: the output itself, or a sub-folder of the same name each."""
    if output is None:
        return [None] * len(adapters)
    if len(adapters) == 1:
        return [output]
    names = [folder_name(adapter.path) for adapter in adapters]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"two adapters are in folders called {name!r}; their outputs would share a name")
    return [output / name for name in names]


def _write(path: Path, text: str) -> None:
    """Paths in it may hold bytes that are no UTF-8: they are escaped as JSON does."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "source": checkpoint.description,
        "revision": checkpoint.revision,
        "files": sorted(file.path for file in checkpoint.files),
        "model_type": (checkpoint.config or {}).get("model_type"),
        "warnings": checkpoint.warnings,
    }


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("safelora-fast", "numpy", "huggingface_hub")}
    return {**packages, "python": platform.python_version(), "kernel": _core.kernel_level()}


__all__ = ["REPORT", "WEIGHTS", "Progress", "project_adapter"]
