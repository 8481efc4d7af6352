"""A training run, from the prepared recipe to the finished output folder."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import sys
from typing import TYPE_CHECKING, Any

from safelora_fast.configuration.defense_section import Subspaces
from safelora_fast.errors import (
    InterruptedRunError,
    MissingDependencyError,
    OutputError,
    SettingsError,
    TrainingError,
)
from safelora_fast.files.json_reader import read_object
from safelora_fast.files.output import alone, whole_folder
from safelora_fast.files.store import write_json
from safelora_fast.models.foreign_errors import first_line
from safelora_fast.recipe.adapted_model import load_model
from safelora_fast.recipe.card import render
from safelora_fast.recipe.mixture import to_table
from safelora_fast.recipe.model_stamp import adapter_digest, recipe_stamp
from safelora_fast.recipe.run_folder import FORMAT, RECORD, RunFolder
from safelora_fast.recipe.run_metrics import machine, peak_bytes, summarize, versions
from safelora_fast.recipe.run_plan import free_space
from safelora_fast.recipe.stop import stop_record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from safelora_fast.defenses import Defense
    from safelora_fast.projection.project import Progress
    from safelora_fast.recipe.prepare import Prepared

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
WRITING = ("PytorchStreamWriter", "inline_container", "No space left", "File too large", "I/O error")


def train(
    prepared: Prepared, *, resume: bool, command: str, progress: Progress | None = None, talk: bool = True
) -> dict[str, Any]:
    """Train, write the finished folder, and return its record.

    Args:
        prepared: the checked recipe.
        resume: continue from the last complete checkpoint, if there is one.
        command: the command line that resumes the run, for messages.
        progress: receives the progress of building a subspace.
        talk: show training progress on standard error.

    Raises:
        SafeLoraFastError: the run failed; the message is one line.
        InterruptedRunError: the user pressed Ctrl-C; the last complete checkpoint is kept.
    """
    folder = RunFolder(prepared.recipe)
    with alone(folder.path) if main_process() else contextlib.nullcontext():
        return _train(prepared, folder, resume=resume, command=command, progress=progress, talk=talk)


def _train(
    prepared: Prepared, folder: RunFolder, *, resume: bool, command: str, progress: Progress | None, talk: bool
) -> dict[str, Any]:
    from safelora_fast.recipe.trainer import Reporter, Stopper, Timekeeper

    checkpoint = folder.last_checkpoint() if resume else None
    record = _record(prepared)
    if main_process():
        folder.check(resume=resume, overwrite=not resume, nbytes=prepared.plan.disk_bytes)
        former = folder.read_record() if resume else {}
        for part in ("data", "input") if former else ():
            if part == "data" or part in former:  # version 0.1.0 did not record its input
                folder.compare(record[part], part)
    with explained(folder), _settings_explained():
        subspaces = Subspaces(build=True, progress=progress)
        defenses = [spec.build(subspaces) for spec in prepared.recipe.defenses]
        times = Timekeeper(folder, 0.0 if checkpoint is None else checkpoint.seconds)
        stopper, reporter = Stopper(), Reporter(talk=talk)
        trainer = _trainer(prepared, defenses, [times, stopper, reporter])
    if main_process():
        folder.begin(record, anew=not resume)
    with _interruptible(folder, trainer, command), explained(folder):
        with stopper, reporter:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))
        if prepared.held_out is not None:
            trainer.evaluate()
        state = trainer.accelerator.get_state_dict(trainer.model)
        trainer.check_projected()
        _check_finite(state)
        record |= {
            "finished": True,
            "steps": trainer.state.global_step,
            "metrics": summarize(trainer.state.log_history),
            "seconds": times.seconds,
            "step_seconds": times.step_seconds,
            "peak_bytes": peak_bytes(),
            "projection": _projection(trainer),
            "stop": stop_record(trainer),
        }
        if main_process():
            _write(prepared, folder.path, trainer, state, record)
    return {"format": FORMAT, **record}


def leave_processes() -> None:
    """Destroy the process group of a distributed run before Python frees the last tensors of a collective."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()


def main_process() -> bool:
    """Return whether this process has rank 0 (set by torchrun and accelerate) and thus writes files and messages."""
    return os.environ.get("RANK", "0") == "0"


def _record(prepared: Prepared) -> dict[str, Any]:
    recipe, plan = prepared.recipe, prepared.plan
    data = {"train": plan.data, "held_out": plan.held_out, "safe": plan.safe}
    return {
        "recipe": recipe.resolved(),
        "data": {name: None if facts is None else facts.sha256 for name, facts in data.items()},
        "input": recipe_stamp(recipe),
        "commit": prepared.commit,
        "plan": plan.to_dict(),
        "defenses": {
            spec.name: {"settings": dict(spec.settings), "active": spec.outline.active} for spec in recipe.defenses
        },
        "trainer_arguments": prepared.arguments.to_dict(),
        "device": str(prepared.arguments.device),
        "versions": versions(),
        "machine": machine(),
    }


def _trainer(prepared: Prepared, defenses: list[Defense], callbacks: list[Any]) -> Any:
    from transformers import PrinterCallback

    from safelora_fast.recipe.trainer import RecipeTrainer

    recipe, held_out, epochs = prepared.recipe, prepared.held_out, prepared.epochs
    examples = prepared.train if epochs is None else epochs.examples
    trainer = RecipeTrainer(
        model=load_model(recipe),
        args=prepared.arguments,
        epochs=epochs,
        train_dataset=to_table(examples, prepared.arguments, tagged=prepared.plan.safe is not None),
        eval_dataset=None if held_out is None else to_table(held_out, prepared.arguments, tagged=False),
        processing_class=prepared.tokenizer,
        callbacks=callbacks,
        defenses=defenses,
        reference=recipe.reference,
        on_nonfinite=recipe.on_nonfinite,
        monitors=[spec.build() for spec in recipe.monitors],
    )
    trainer.remove_callback(PrinterCallback)
    if recipe.margin is not None:
        from safelora_fast.scoring.margin_callback import MarginCallback

        margin = MarginCallback(
            trainer,
            prepared.tokenizer,
            every=recipe.margin.every,
            pairs=prepared.pairs,
            system=recipe.margin.system,
            strings=recipe.data.strings,
            stop=prepared.stop,
        )
        trainer.add_callback(margin)
    return trainer


def _projection(trainer: Any) -> dict[str, Any] | None:
    """Return the report of the projection at the end of training, if there was one."""
    report = trainer.projection_report
    if report is None:
        return None
    warnings = [warning.partition(": ")[2] for warning in report.warnings]  # without the adapter's name
    return {**report.to_dict(), "warnings": warnings}


def _check_finite(state: dict[str, Any]) -> None:
    for name, tensor in state.items():
        if "lora_" in name and not tensor.isfinite().all():
            raise TrainingError(
                f"the trained adapter holds NaN or Inf, first in {name}, and was not written; lower training.learning_rate"
            )


def _write(prepared: Prepared, path: Path, trainer: Any, state: dict[str, Any], record: dict[str, Any]) -> None:
    try:
        with whole_folder(path, overwrite=True, keep_others=True) as partial:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(str(partial), state_dict=state)
            _sort_sets(partial / "adapter_config.json")
            if prepared.tokenizer_changed:
                prepared.tokenizer.save_pretrained(str(partial))
            (partial / "README.md").write_text(render(prepared, record), encoding="utf-8")
            record["adapter_sha256"] = adapter_digest(partial)  # a record tells results of another adapter even alone
            write_json(partial / RECORD, {"format": FORMAT, **record})
    except OutputError as error:
        raise _no_room(path, error) from error


def _no_room(path: Path, error: Exception) -> OutputError:
    """Return the error for a full disk; the user can free space and resume from the last checkpoint."""
    return OutputError(
        f"{path}: cannot be written ({first_line(error)}), {free_space(path):,} bytes are free; whole checkpoints stay: make "
        "room and pass --resume"
    )


def _sort_sets(file: Path) -> None:
    """Sort lists of module names, whose order PEFT leaves random, so that the same run writes the same bytes."""
    config = read_object(file)
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    write_json(file, config)


@contextlib.contextmanager
def _interruptible(folder: RunFolder, trainer: Any, command: str) -> Iterator[None]:
    """After Ctrl-C or SIGTERM, report the last complete checkpoint and how to resume."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        step = trainer.state.global_step
        whole = folder.last_checkpoint()
        kept = "no checkpoint was whole yet" if whole is None else f"the checkpoint of step {whole.step} is whole"
        message = f"interrupted after step {step}; {kept}; to go on: {command}"
        if isinstance(stop, SystemExit):
            print(message, file=sys.stderr)
            raise
        raise InterruptedRunError(message) from None


@contextlib.contextmanager
def explained(folder: RunFolder) -> Iterator[None]:
    """Convert errors from the trainer, the adapter, and the operating system to one-line errors."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory ({first_line(error)}); lower training.per_device_train_batch_size and raise "
            "training.gradient_accumulation_steps, or lower training.max_length"
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if getattr(error, "errno", None) in FULL or any(words in str(error) for words in WRITING):
            raise _no_room(folder.path, error) from error
        raise
    except ImportError as error:
        raise MissingDependencyError(first_line(error)) from error


@contextlib.contextmanager
def _settings_explained() -> Iterator[None]:
    """Convert the ValueError that trainers raise for incompatible arguments to a SettingsError."""
    try:
        yield
    except ValueError as error:
        raise SettingsError(f"training: {first_line(error)}") from error
