"""Projection of a full fine-tune on disk: plan, shard by shard, select, report."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from safelora_fast import _core
from safelora_fast.checkpoints.provenance import describe, same_content, sampled
from safelora_fast.checkpoints.sources import A_MODEL, open_checkpoint
from safelora_fast.checkpoints.weight_norms import weight_norm
from safelora_fast.errors import CheckpointError, InterruptedRunError, OutputError, PairingError, SettingsError
from safelora_fast.files.argument_checks import check_path
from safelora_fast.files.digest import text_digest
from safelora_fast.files.json_reader import read_object
from safelora_fast.files.output import check_target, resumable_folder
from safelora_fast.files.progress import bar_on_a_terminal, log_warnings
from safelora_fast.files.store import changed_settings, plain, settings_message, to_json, write_json
from safelora_fast.printable import counted
from safelora_fast.projection.batch import REPORT, describe_model, versions
from safelora_fast.projection.jobs import refuse_equal
from safelora_fast.projection.model_pair import local_models, open_pair
from safelora_fast.projection.report import AdapterReport, ModuleReport, ProjectionReport, published
from safelora_fast.projection.settings import WholeModelSettings, chosen
from safelora_fast.whole_models.card import render
from safelora_fast.whole_models.plan import Others, plan_whole_model
from safelora_fast.whole_models.shard_writer import (
    finish_shard,
    needs_cosine,
    read_record,
    replace_tensors,
    restore,
    write_shard,
)
from safelora_fast.whole_models.side_files import copy_side_files, side_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast.checkpoints.sources import Checkpoint, TensorEntry
    from safelora_fast.projection.model_pair import ModelPair
    from safelora_fast.projection.module_reports import Progress
    from safelora_fast.projection.settings import Settings
    from safelora_fast.subspace.safe_subspace import SafeSubspace
    from safelora_fast.whole_models.plan import WholeModule, WholePlan

STATE = "safelora_unfinished.json"
FORMAT = 1
Metrics = dict[str, Any]


def project_model(
    finetuned: str | Path,
    *,
    aligned: str | Path,
    base: str | Path | None = None,
    output: str | Path | None,
    subspace: SafeSubspace | None = None,
    embeddings: bool = False,
    others: Others = "finetuned",
    overwrite: bool = False,
    progress: Progress | bool | None = None,
    **settings: Any,
) -> ProjectionReport:
    """Project a full fine-tune with SafeLoRA (Hsu et al. 2024, arXiv 2405.16833, section 4.2) and write the result.

    W ← W_aligned + O·(W_finetuned − W_aligned) in the selected modules; all other bytes are the fine-tuned model's. The
    three models are streamed, a tile of columns at a time. Shards, names and dtypes stay as they are, and other files
    are copied. A run that was killed goes on at the first shard that was not finished. docs/whole-models.md has the
    costs.

    Args:
        finetuned: path or Hub id (optionally with `@revision`) of a full fine-tune of `aligned`.
        aligned: the model that was fine-tuned.
        base: the model before alignment.
        subspace: a subspace of the two models instead of `base`, for operator "orthogonal" and select "all".
        output: the folder to create; None writes nothing.
        embeddings: project input embeddings and the head too, if their shapes agree.
        others: where tensors that are no modules (norms, biases, embeddings, head) come from: "finetuned" or "aligned".
        overwrite: replace an existing output folder, and an unfinished one that was made with other settings.
        progress: receives the progress; None shows a bar if standard error is a terminal, False shows nothing.
        settings: operator, normalize, rank, energy, keep, sides, weight, select, threshold, num_layers, threads and
            exclude, as in :func:`safelora_fast.project_adapter`. weight is for the operators "restore" and
            "extrapolate", which need select "all".

    Returns:
        The report, which is also written to `safelora_report.json`: B is W_finetuned − W_aligned, and A is 1. The cosine
        is NaN where it was not needed: with select "all" and an operator other than "safelora".

    Raises:
        SafeLoraFastError: an input is invalid, or the model is no fine-tune of `aligned`; the message is one line.
    """
    if (base is None) == (subspace is None):
        raise SettingsError("give either base, or a subspace of aligned and base")
    known = None if subspace is None else subspace.as_pair()
    checked = WholeModelSettings(**settings) if known is None else known.settings(WholeModelSettings, **settings)
    if others not in get_args(Others):
        raise SettingsError(f"others must be one of {', '.join(get_args(Others))}, not {others!r}")
    check_path("finetuned", finetuned, A_MODEL)
    local = [
        *local_models(aligned, aligned if base is None else base),
        *(path for path in [Path(finetuned)] if path.exists()),
    ]
    if output is not None:
        check_path("output", output, "the folder to make, or None")
    target = None if output is None else Path(output)
    model = open_checkpoint(finetuned, role="fine-tuned")
    if known is None:
        pair = open_pair(aligned, base)
    else:
        known.aligned, pair = open_checkpoint(aligned, role="aligned"), known
    run = _Run(model, pair, subspace, checked, embeddings, others)
    with bar_on_a_terminal(progress) as told:
        if target is None:
            report = run.report(run.pass_over(None, told), None, target)
        else:
            check_target(target, local, overwrite=overwrite, nbytes=run.room_needed(target), mark=REPORT)
            with resumable_folder(target, overwrite=overwrite) as folder:
                report = run.write(folder, target, told, overwrite=overwrite)
    log_warnings(report.warnings)
    return report


class _Run:
    """One run: three models, the plan, and the settings."""

    def __init__(
        self,
        finetuned: Checkpoint,
        pair: ModelPair,
        subspace: SafeSubspace | None,
        settings: Settings,
        embeddings: bool,
        others: Others,
    ) -> None:
        self.began = time.perf_counter()
        self.finetuned, self.pair, self.settings, self.source = finetuned, pair, settings, others
        self.embeddings = embeddings
        self.plan: WholePlan = plan_whole_model(
            finetuned, pair.aligned, subspace or pair.base, embeddings=embeddings, exclude=settings.exclude
        )
        models = {"finetuned": finetuned, "aligned": pair.aligned, **({} if subspace else {"base": pair.base})}
        self.described = {role: describe(checkpoint) for role, checkpoint in models.items()}
        if subspace is not None:
            former = subspace.sources.get("aligned")
            if former is not None and not same_content(former, self.described["aligned"]):
                raise PairingError(
                    f"{pair.aligned.description}: is not the aligned model that the subspace was built from, {former['source']}; "
                    "give that one, or build the subspace again"
                )
            self.described["subspace"] = {"source": None, "revision": None, **pair.identity()}
        elif same_content(self.described["aligned"], self.described["base"]):
            refuse_equal([0.0])
        same = same_content(self.described["finetuned"], self.described["aligned"])
        if same and not settings.described_operator.adds:
            raise PairingError(
                f"{finetuned.description}: holds the same weights as {pair.aligned.description}, so there is no update to "
                "project; give the fine-tuned model"
            )

    def room_needed(self, target: Path) -> int:
        """Return how many bytes are still to be written."""
        unfinished = target.with_name(f".{target.name}.unfinished")
        return sum(
            file.size for file, _ in self.plan.shards.values() if not _record(unfinished, Path(file.path)).exists()
        )

    def write(self, folder: Path, target: Path, told: Progress | None, *, overwrite: bool) -> ProjectionReport:
        """Write all shards that are not there yet, and then what depends on all of them."""
        self._check_state(folder, overwrite=overwrite)
        beside = side_files(self.finetuned)
        try:
            metrics = self.pass_over(folder, told)
            if self.settings.select == "number":
                self._restore_unselected(folder, self._selected(metrics))
            report = self.report(metrics, folder, target)
            copy_side_files(beside, folder)
            (folder / REPORT).write_text(to_json(published(report).to_dict()) + "\n", encoding="utf-8")
            (folder / "README.md").write_text(render(report), encoding="utf-8", errors="backslashreplace")
        except KeyboardInterrupt:
            raise InterruptedRunError(
                f"interrupted; finished shards stay in {folder}, and the same command goes on from there"
            ) from None
        except OSError as error:
            raise OutputError(
                f"{target}: cannot be written: {error.strerror or error}; finished shards stay in {folder}, and the same "
                "command goes on from there"
            ) from error
        for path in (*folder.glob("*.record.json"), folder / STATE):
            path.unlink()
        return report

    def pass_over(self, folder: Path | None, told: Progress | None) -> list[Metrics]:
        """Return the metrics of all modules; with a folder, write each shard unless it is finished."""
        if told is not None:
            told.start(self.plan.nbytes, len(self.plan.modules))
        metrics: list[Metrics] = []
        done = 0
        largest = max(module.nbytes for module in self.plan.modules)
        buffers = np.empty(largest, np.uint8), np.empty(largest, np.uint8)

        def after(module: WholeModule) -> None:
            nonlocal done
            done += module.bytes_read
            if told is not None:
                told.advance(done, module.name)

        for file, modules in self.plan.shards.values():
            source = Path(file.path)
            shard = None if folder is None else folder / source.name
            record = None if folder is None else _record(folder, source)
            former = read_record(record, shard, source, len(modules)) if shard and record else None
            if former is not None:
                metrics += former
                for module in modules:
                    after(module)
                continue
            found = write_shard(source, shard, modules, self.settings, buffers, keeps=self._keeps, told=after)
            if shard is not None and record is not None:
                replace_tensors(shard, self._replaced(file))
                finish_shard(shard, record, {"modules": found})
            metrics += found
        refuse_equal([one["v_norm"] for one in metrics])
        return metrics

    def report(self, metrics: Sequence[Metrics], folder: Path | None, target: Path | None) -> ProjectionReport:
        """Return the report, after the selection."""
        selected = self._selected(metrics)
        modules = [
            self._module(module, found, projected=module.name in selected)
            for module, found in zip(self.plan.modules, metrics, strict=True)
        ]
        copied = [
            {"tensor": name, "reason": self._reason(partner)} for name, partner in sorted(self.plan.others.items())
        ]
        fingerprint = None
        if folder is not None:
            fingerprint = text_digest([sampled(folder / Path(path).name) for path in self.plan.shards])
        notes = _notes(modules)
        written = None if target is None else str(target)
        model = AdapterReport(
            self.finetuned.description, written, modules, copied, None, notes, self.plan.excluded, fingerprint
        )
        return ProjectionReport(
            settings={**self.settings.effective(), "embeddings": self.embeddings, "others": self.source},
            aligned=describe_model(self.pair.aligned),
            base=describe_model(self.pair.base),
            adapters=[model],
            bytes_read=self.plan.nbytes,
            seconds=time.perf_counter() - self.began,
            versions=versions(),
        )

    def _check_state(self, folder: Path, *, overwrite: bool) -> None:
        """Record what the folder is made from, or check that it is made from the same."""
        settings = {name: value for name, value in self.settings.effective().items() if name != "threads"}
        state = plain(
            {
                "format": FORMAT,
                "version": _core.__version__,
                "settings": {**settings, "embeddings": self.embeddings, "others": self.source},
                "models": {
                    role: {**found, "source": found["source"] if found["revision"] else None}
                    for role, found in self.described.items()
                },
            }
        )
        path = folder / STATE
        if path.exists():
            remedy = "delete this folder, or pass --overwrite"
            try:
                message = settings_message(folder, changed_settings(read_object(path), state), remedy)
            except ValueError as error:
                message = f"{path}: {error}; {remedy}"
            if message is None:
                return
            if not overwrite:
                raise OutputError(message)
        elif not overwrite and any(folder.iterdir()):
            raise OutputError(f"{folder}: holds files of something else; move them, or pass --overwrite to delete them")
        for left in folder.iterdir():
            left.unlink() if left.is_file() or left.is_symlink() else shutil.rmtree(left)
        write_json(path, state)

    def _keeps(self, found: Metrics) -> bool:
        """Whether a module is projected by what is known so far; `number` decides at the end."""
        if self.settings.select == "number":
            return not math.isnan(found["cosine"])
        return bool(self._chosen({"": found}))

    def _selected(self, metrics: Sequence[Metrics]) -> set[str]:
        return self._chosen({module.name: found for module, found in zip(self.plan.modules, metrics, strict=True)})

    def _chosen(self, found: Mapping[str, Metrics]) -> set[str]:
        if needs_cosine(self.settings):
            return chosen({name: one["cosine"] for name, one in found.items()}, self.settings)
        adds = self.settings.described_operator.adds
        return {name for name, one in found.items() if one["v_norm"] and (adds or one["update_norm"])}

    def _restore_unselected(self, folder: Path, selected: set[str]) -> None:
        for file, modules in self.plan.shards.values():
            unselected = [module for module in modules if module.name not in selected]
            restore(Path(file.path), folder / Path(file.path).name, unselected)

    def _replaced(self, file: _core.SafetensorsFile) -> list[tuple[TensorEntry, TensorEntry]]:
        """Return the tensors of a shard that come from the aligned model, each with its replacement."""
        found: list[tuple[TensorEntry, TensorEntry]] = []
        if self.source == "finetuned":
            return found
        for name, partner in self.plan.others.items():
            ours = self.finetuned.tensor(name)
            if ours.file.path != file.path or partner is None:
                continue
            theirs = self.pair.aligned.tensor(partner)
            if theirs.dtype != ours.dtype:
                raise CheckpointError(
                    f"{self.finetuned.description}: {name} is {ours.dtype}, but {theirs.dtype} in the aligned model, so its "
                    "bytes cannot be taken from there; use others finetuned"
                )
            found.append((ours, theirs))
        return found

    def _reason(self, partner: str | None) -> str:
        if partner is None:
            return "the aligned model has no tensor of this name and shape: kept"
        return "taken from the aligned model" if self.source == "aligned" else "not a module: kept"

    def _module(self, module: WholeModule, found: Metrics, *, projected: bool) -> ModuleReport:
        weight = weight_norm(module.planned.group.aligned)
        before, after = found["update_norm"], found["update_norm_projected"]
        reason = self.settings.why(found["cosine"], projected=projected)
        if not needs_cosine(self.settings):
            reason = "all modules were selected" if projected else "V or the update is zero"
        return ModuleReport(
            name=module.name,
            cosine=found["cosine"],
            projected=projected,
            reason=reason,
            gain=after / before if before else math.nan,
            rank=min(module.planned.shape),
            b_norm=before,
            b_norm_after=after,
            update_norm=before,
            update_norm_after=after,
            v_norm=found["v_norm"],
            v_rank=found["rank"],
            v_energy=found["energy"],
            sources=[
                asdict(source) | ({"base_file": ""} if module.subspace else {}) for source in module.planned.sources
            ],
            v_ratio=found["v_norm"] / weight if weight else math.nan,
        )


def _notes(modules: Sequence[ModuleReport]) -> list[str]:
    larger = [module for module in modules if module.update_norm > module.v_norm > 0]
    if not larger:
        return []
    return [
        f"‖W_finetuned − W_aligned‖ is larger than ‖V‖ in {counted(len(larger), 'module')} of {len(modules)}, e.g. "
        f"{larger[0].name}: is aligned the model that was fine-tuned?"
    ]


def _record(folder: Path, source: Path) -> Path:
    return folder / f"{source.name}.record.json"
