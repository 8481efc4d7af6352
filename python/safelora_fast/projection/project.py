"""Projection of trained adapters on disk: plan, stream, select, write, report."""

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
from safelora_fast.errors import SettingsError
from safelora_fast.files.argument_checks import check_path
from safelora_fast.files.output import check_target, whole_folder
from safelora_fast.files.progress import bar_on_a_terminal, log_warnings
from safelora_fast.projection import card
from safelora_fast.projection.copied_tensors import bypass_note, copied_tensors, refuse_bypassing
from safelora_fast.projection.jobs import refuse_equal, start_stream
from safelora_fast.projection.plan import plan_projection
from safelora_fast.projection.report import AdapterReport, ModuleReport, ProjectionReport, published
from safelora_fast.projection.settings import Settings
from safelora_fast.projection.writer import AdapterWriter, Output
from safelora_fast.projection.written_keys import settled_adapters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.projection.jobs import Plan, Start, Stream
    from safelora_fast.projection.writer import FactorOutcome

REPORT = "safelora_report.json"
PathLike = str | Path


class Progress(Protocol):
    """Receives the amount of work once, and the progress after each module."""

    def start(self, total_bytes: int, modules: int) -> None:
        """Begin a run over `modules` modules and `total_bytes` bytes; called before the first byte is read."""

    def advance(self, done_bytes: int, module: str) -> None:
        """Report the bytes processed so far; called after each module."""


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
    keep: float | None = None,
    sides: str | None = None,
) -> ProjectionReport:
    """Project one or more PEFT adapters with SafeLoRA (Hsu et al. 2024, arXiv 2405.16833) and write the results.

    The checkpoints are streamed once for all adapters; no model is loaded. Inputs are never modified. The output folder
    appears only when it is complete. docs/methods.md defines the operators and the selection.

    Args:
        adapter: the folder or Hub id (optionally with `@revision`) of a PEFT LoRA adapter, or a sequence of them.
        aligned: path or Hub id (optionally with `@revision`) of the model that the adapter was trained on.
        base: path or Hub id of the model before alignment.
        output: the folder to create; several adapters get one subfolder each, with the name of their own folder. None
            writes nothing.
        operator: the operator for selected modules: "safelora" (C = V·Vᵀ/‖V‖_F), "orthogonal" (U_k·U_kᵀ), "attenuate"
            (shrinks the part outside the leading directions) or "zero".
        normalize: "frobenius" (default, as in the paper) or "spectral"; only for safelora.
        rank: number of columns of U_k; only for orthogonal and attenuate.
        energy: share of ‖V‖²_F that U_k must capture, instead of `rank`.
        select: "threshold" (cosine ≤ threshold), "number" (the lowest cosines) or "all".
        threshold: the largest cosine to project; 0.5 by default.
        num_layers: the number of modules for "number"; 10 by default.
        threads: number of threads; all cores by default. It does not affect the result.
        exclude: names or patterns ("lm_head", "layers.0.*") of modules to leave unchanged; the report lists them.
        strict: reject adapters with trained non-LoRA tensors (modules_to_save, biases, embeddings, norms).
        overwrite: replace an existing output folder.
        progress: receives the progress; None shows a bar if standard error is a terminal, False shows nothing.
        keep: the share of the part outside U_k (and W_k) to keep; only for attenuate.
        sides: "both" (default) changes B and A, "left" only B; only for attenuate.

    Returns:
        The report, which is also written to `safelora_report.json`.

    Raises:
        SafeLoraFastError: an input is invalid; the message is one line, and nothing is written.
    """
    chosen_settings = (operator, normalize, rank, energy, select, threshold, num_layers, threads, exclude, strict)
    settings = Settings(*chosen_settings, keep=keep, sides=sides)  # type: ignore[arg-type]
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
    """Project adapters with checked settings; see :func:`project_adapter`.

    `start` starts the stream: the extension's or another one. `keep_keys` writes the adapters' keys unchanged, for
    adapters that were saved from a loaded model.
    """
    paths = _paths(adapter)
    if output is not None:
        check_path("output", output, "the folder to make, or None")
    began = time.perf_counter()
    target = None if output is None else Path(output)
    adapters = load_adapters(paths, settings.exclude, keep_keys=keep_keys)
    folders = _folders(adapters, target)
    plan, adapters, models = prepare(
        adapters, aligned, base, target, overwrite=overwrite, mark=REPORT, keep_keys=keep_keys
    )
    copied = [copied_tensors(one, models[0]) for one in adapters]
    if settings.strict:
        for one, tensors in zip(adapters, copied, strict=True):
            refuse_bypassing(one, tensors)
    with contextlib.ExitStack() as stack:
        writers: list[AdapterWriter | None] = [None] * len(adapters)
        if target is not None:
            partial = stack.enter_context(whole_folder(target, overwrite=overwrite))
            places = [partial / folder.relative_to(target) for folder in folders if folder is not None]
            writers = [AdapterWriter(one, place) for one, place in zip(adapters, places, strict=True)]
        outputs = [Output(index, settings, writer) for index, writer in enumerate(writers)]
        stream = start(plan, settings, keep_projected=target is not None)
        run_plan(plan, stream, outputs, progress)
        report = ProjectionReport(
            settings=settings.effective(),
            aligned=_describe(models[0]),
            base=_describe(models[1]),
            adapters=[
                AdapterReport(
                    label(one.path),
                    None if folder is None else str(folder),
                    result.settled(),
                    tensors,
                    one.config.get("base_model_name_or_path") or None,
                    [*one.notes, *bypass_note(tensors)],
                    list(one.excluded),
                )
                for one, folder, result, tensors in zip(adapters, folders, outputs, copied, strict=True)
            ],
            bytes_read=stream.nbytes,
            seconds=time.perf_counter() - began,
            versions=_versions(),
        )
        for index, writer in enumerate(writers):
            if writer is not None:
                content = published(replace(report, adapters=[report.adapters[index]])).to_dict()
                _write(writer.folder / REPORT, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
                _write(writer.folder / "README.md", card.render(report, index))
    return report


def prepare(
    adapters: list[Adapter],
    aligned: PathLike,
    base: PathLike,
    output: Path | None,
    *,
    overwrite: bool,
    mark: str,
    copies: int = 1,
    keep_keys: bool = False,
) -> tuple[Plan, list[Adapter], tuple[Checkpoint, Checkpoint]]:
    """Check all inputs before the first byte of a weight is read.

    An output folder that contains the file `mark` may be overwritten; each adapter will be written `copies` times.

    Returns:
        The plan, the adapters with their output keys, and the two checkpoints.
    """
    for role, model in {"aligned": aligned, "base": base}.items():
        check_path(role, model, A_MODEL)
    if output is not None:
        inputs = [adapter.path for adapter in adapters] + [path for path in map(Path, (aligned, base)) if path.exists()]
        size = copies * sum(adapter.file.size for adapter in adapters)
        check_target(output, inputs, overwrite=overwrite, nbytes=size, mark=mark)
    models = open_checkpoint(aligned, role="aligned"), open_checkpoint(base, role="base")
    if same_place(*models):
        refuse_equal([0.0])
    plan = plan_projection(adapters, *models)
    return plan, adapters if keep_keys else settled_adapters(plan, models[0]), models


def run_plan(plan: Plan, stream: Stream, outputs: Sequence[Output], progress: Progress | None) -> None:
    """Run the stream, and add each module to the outputs of its adapters.

    Raises:
        PairingError: aligned and base hold the same weights in all modules.
        SafeLoraFastError: a weight or factor is NaN or infinite.
    """
    norms = []
    with contextlib.closing(stream):
        if progress is not None:
            progress.start(stream.nbytes, len(plan.modules))
        for outcome in stream:
            planned = plan.modules[outcome.index]
            norms.append(outcome.v_norm)
            weight = weight_norm(planned.group.aligned)
            results: Sequence[FactorOutcome] = outcome.factors
            for factors, found in zip(planned.group.factors, results, strict=True):
                report = ModuleReport(
                    name=planned.name,
                    cosine=found.cosine,
                    projected=False,
                    reason="",
                    gain=found.gain,
                    rank=factors.lora_b.cols,
                    b_norm=found.lora_b_norm,
                    b_norm_after=found.lora_b_norm_projected,
                    update_norm=found.update_norm,
                    update_norm_after=found.update_norm_projected,
                    v_norm=outcome.v_norm,
                    v_rank=outcome.rank,
                    v_energy=outcome.energy,
                    sources=[asdict(source) for source in planned.sources],
                    v_ratio=outcome.v_norm / weight if weight else math.nan,
                )
                for output in outputs:
                    if output.adapter == factors.adapter:
                        output.add(report, factors, found)
            if progress is not None:
                progress.advance(stream.bytes_done, planned.name)
    refuse_equal(norms)


def _paths(adapter: PathLike | Sequence[PathLike]) -> list[PathLike]:
    paths = [adapter] if isinstance(adapter, str | bytes | Path) or not isinstance(adapter, Iterable) else list(adapter)
    if not paths:
        raise SettingsError("no adapter was given")
    for path in paths:
        check_path("adapter", path, "the folder of a PEFT adapter, or several")
    return paths


def _folders(adapters: Sequence[Adapter], output: Path | None) -> list[Path | None]:
    """Return each adapter's output folder: the output itself, or a subfolder named after the adapter."""
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
    """Write text, and escape undecodable bytes of paths as in JSON."""
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
