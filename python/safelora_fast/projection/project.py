"""Projection of trained adapters on disk: plan, stream, select, write, report."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safelora_fast.checkpoints.adapter import WEIGHTS, Adapter, check_exclude, load_adapter
from safelora_fast.checkpoints.resolver import folder_name, label
from safelora_fast.errors import AdapterError, CheckpointError, SafeLoraFastError, SettingsError
from safelora_fast.files.argument_checks import check_path
from safelora_fast.files.output import check_target
from safelora_fast.files.progress import bar_on_a_terminal, log_warnings
from safelora_fast.projection.batch import REPORT, Item, check_output, merged, project_batch
from safelora_fast.projection.model_pair import local_models, open_pair, settings_and_pair
from safelora_fast.projection.module_reports import Progress
from safelora_fast.projection.part_file import JoinedParts
from safelora_fast.projection.written_keys import settled_adapters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.projection.jobs import Plan, Start
    from safelora_fast.projection.model_pair import ModelPair, Vectors
    from safelora_fast.projection.report import ProjectionReport
    from safelora_fast.projection.settings import Settings

PathLike = str | Path


def project_adapter(
    adapter: PathLike | Sequence[PathLike],
    *,
    aligned: PathLike | None = None,
    base: PathLike | None = None,
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
    weight: float | None = None,
    safe_adapter: PathLike | None = None,
    subspace: Vectors | None = None,
    parts: PathLike | None = None,
) -> ProjectionReport:
    """Project one or more PEFT adapters with SafeLoRA (Hsu et al. 2024, arXiv 2405.16833) and write the results.

    The checkpoints are streamed once for all adapters; no model is loaded. Inputs are never modified. Each adapter's
    output folder appears only when it is complete. docs/methods.md defines the operators and the selection.
    :func:`~safelora_fast.project_fleet` projects thousands.

    Args:
        adapter: the folder or Hub id (optionally with `@revision`) of a PEFT LoRA adapter, or a sequence of them.
        aligned: path or Hub id (optionally with `@revision`) of the model that the adapter was trained on.
        base: path or Hub id of the model before alignment.
        output: the folder to create; several adapters get one subfolder each, with the name of their own folder (or,
            where two names are equal, their path below the folder that holds them all). None writes nothing.
        operator: the operator for selected modules: "safelora" (C = V·Vᵀ/‖V‖_F), "orthogonal" (U_k·U_kᵀ), "attenuate"
            (shrinks the part outside the leading directions), "merge" (with a safety-tuned adapter) or "zero".
        normalize: "frobenius" (default, as in the paper) or "spectral"; only for safelora.
        rank: number of columns of U_k; only for orthogonal and attenuate.
        energy: share of ‖V‖²_F that U_k must capture, instead of `rank`.
        select: "threshold" (cosine ≤ threshold), "number" (the lowest cosines) or "all".
        threshold: the largest cosine to project; 0.5 by default.
        num_layers: the number of modules for "number"; 10 by default.
        threads: number of threads; all cores by default. It does not affect the result.
        exclude: names or patterns ("lm_head", "layers.0.*") of modules to leave unchanged; the report lists them.
        strict: reject adapters with trained non-LoRA tensors (modules_to_save, biases, embeddings, norms).
        overwrite: replace existing output folders of these adapters; others in `output` stay.
        progress: receives the progress; None shows a bar if standard error is a terminal, False shows nothing.
        keep: the share of the part outside U_k (and W_k) to keep; only for attenuate.
        sides: "both" (default) changes B and A, "left" only B; only for attenuate.
        weight: the share of the adapter itself; only for merge (SafeMERGE, arXiv 2503.17239, uses 0.8).
        safe_adapter: the safety-tuned adapter, as `adapter`; only for merge. It must adapt the same modules.
        subspace: a :class:`~safelora_fast.SafeSubspace` instead of `aligned` and `base`; only for orthogonal and select
            "all", with all vectors by default.
        parts: a folder of files that `project --modules-shard` wrote, to join instead of reading V. The same adapters,
            models and settings must be given.

    Returns:
        The report, which is also written to `safelora_report.json`.

    Raises:
        SafeLoraFastError: an input is invalid; the message is one line. Of one adapter, nothing is written; of several,
            those without a fault are written first.
    """
    given = {
        "operator": operator,
        "normalize": normalize,
        "rank": rank,
        "energy": energy,
        "select": select,
        "threshold": threshold,
        "num_layers": num_layers,
        "threads": threads,
        "exclude": exclude,
        "strict": strict,
        "keep": keep,
        "sides": sides,
        "weight": weight,
        "safe_adapter": safe_adapter,
    }
    settings, pair = settings_and_pair(subspace, aligned, base, given)
    with bar_on_a_terminal(progress) as told:
        report = project_folders(
            adapter,
            settings,
            aligned=aligned,
            base=base,
            output=output,
            overwrite=overwrite,
            progress=told,
            pair=pair,
            parts=parts,
        )
    log_warnings(report.warnings)
    return report


def project_folders(
    adapter: PathLike | Sequence[PathLike],
    settings: Settings,
    *,
    aligned: PathLike | None,
    base: PathLike | None,
    output: PathLike | None,
    overwrite: bool = False,
    progress: Progress | None = None,
    start: Start | None = None,
    keep_keys: bool = False,
    pair: ModelPair | None = None,
    parts: PathLike | None = None,
) -> ProjectionReport:
    """Project adapters with checked settings; see :func:`project_adapter`.

    `pair` replaces `aligned` and `base`. `start`, or a folder of `parts`, starts another stream than that of the pair.
    `keep_keys` writes the adapters' keys unchanged, for adapters that were saved from a loaded model.
    """
    paths = _paths(adapter)
    if output is not None:
        check_path("output", output, "the folder to make, or None")
    target = None if output is None else Path(output)
    loaded: list[Adapter | SafeLoraFastError] = []
    for path in paths:
        try:
            loaded.append(load_adapter(path, settings.exclude, keep_keys=keep_keys))
        except (AdapterError, CheckpointError) as error:
            if len(paths) == 1:
                raise
            loaded.append(error)
    adapters = [one for one in loaded if isinstance(one, Adapter)]
    check_exclude(adapters, settings.exclude)
    folders = _folders(adapters, target, alone=len(paths) == 1)
    items = [Item(one, folder, overwrite) for one, folder in zip(adapters, folders, strict=True)]
    local = local_models(aligned, base) if pair is None else []
    for item in items:
        check_output(item, local)
    pair = pair or open_pair(aligned, base)
    if parts is not None:
        start = JoinedParts(Path(parts), pair.identity())
    found = project_batch(items, pair, settings, progress=progress, start=start, keep_keys=keep_keys)
    failures = [one for one in [*loaded, *found] if isinstance(one, SafeLoraFastError)]
    if failures:
        others = "" if len(paths) == 1 else f" ({len(failures)} of {len(paths)} adapters failed, the others are done)"
        raise type(failures[0])(f"{failures[0]}{others}") from failures[0]
    return merged([one for one in found if not isinstance(one, SafeLoraFastError)])


def prepare(
    adapters: list[Adapter],
    aligned: PathLike,
    base: PathLike,
    output: Path | None,
    *,
    overwrite: bool,
    mark: str,
    copies: int = 1,
) -> tuple[Plan, list[Adapter]]:
    """Check all inputs before the first byte of a weight is read.

    An output folder that contains the file `mark` may be overwritten; each adapter will be written `copies` times.

    Returns:
        The plan, and the adapters with their output keys.
    """
    local = local_models(aligned, base)
    if output is not None:
        inputs = [*(adapter.path for adapter in adapters), *local]
        size = copies * sum(adapter.file.size for adapter in adapters)
        check_target(output, inputs, overwrite=overwrite, nbytes=size, mark=mark)
    pair = open_pair(aligned, base)
    plan = pair.plan(adapters)
    return plan, settled_adapters(plan, pair.aligned)


def _paths(adapter: PathLike | Sequence[PathLike]) -> list[PathLike]:
    paths = [adapter] if isinstance(adapter, str | bytes | Path) or not isinstance(adapter, Iterable) else list(adapter)
    if not paths:
        raise SettingsError("no adapter was given")
    for path in paths:
        check_path("adapter", path, "the folder of a PEFT adapter, or several")
    return paths


def _folders(adapters: Sequence[Adapter], output: Path | None, *, alone: bool) -> list[Path | None]:
    """Return each adapter's output folder: the output itself, or a subfolder named after the adapter."""
    if output is None:
        return [None] * len(adapters)
    if alone:
        return [output]
    return [output / name for name in output_names(adapters)]


def output_names(adapters: Sequence[Adapter]) -> list[str]:
    """Return a name for each adapter: that of its folder or, where two are equal, its path below the common folder.

    Raises:
        SettingsError: the same adapter was given twice.
    """
    names = [folder_name(adapter.path) for adapter in adapters]
    if len(set(names)) < len(names):
        shown = [Path.cwd() / label(adapter.path) for adapter in adapters]
        common = os.path.commonpath(shown)
        names = [os.path.relpath(path, common) for path in shown]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"the adapter {name!r} was given twice; their outputs would share a name")
    return names


__all__ = ["REPORT", "WEIGHTS", "PathLike", "Progress", "prepare", "project_adapter", "project_folders"]
