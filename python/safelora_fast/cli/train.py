"""`safelora-fast train`: fine-tune a LoRA adapter with defenses, from a recipe."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelora_fast.cli import options
from safelora_fast.printable import say

if TYPE_CHECKING:
    from safelora_fast.recipe.prepare import Prepared
    from safelora_fast.recipe.run_folder import RunFolder


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The recipe; see docs/recipe.md.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the file, e.g. defenses.kl.weight=0.2."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", metavar="", help="Print the plan with estimates of memory and cost; load no weights."
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", metavar="", help="Resume from the last complete checkpoint of the same recipe.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace the output of an earlier run.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", metavar="", help="Print the plan or the record as JSON on standard output, and nothing else."
        ),
    ] = False,
    end_with_stdin: Annotated[
        bool,
        typer.Option("--end-with-stdin", hidden=True, help="Stop when standard input ends, as after SIGTERM."),
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Fine-tune a LoRA adapter with in-training defenses, from one YAML file that is checked first.

    The output folder holds an adapter that PEFT loads, a model card that states the defenses, and a record of the run.
    """
    from safelora_fast.configuration.signatures import check_packages

    check_packages()
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.files.store import to_json
    from safelora_fast.recipe.recipe import load_recipe
    from safelora_fast.recipe.run_folder import RunFolder

    if end_with_stdin:
        _end_with(sys.stdin.fileno())
    recipe = load_recipe(config, overrides or [])
    folder = RunFolder(recipe)
    main = os.environ.get("RANK", "0") == "0"
    talks = main and not quiet
    if main:
        folder.check(resume=resume, overwrite=overwrite or (dry_run and not resume))
    record = folder.read_record() if resume and not dry_run else {}
    if record.get("finished"):
        _show_record(record, folder.path, as_json=as_json, talks=talks)
        return
    from safelora_fast.checkpoints.resolver import find_model

    find_model(recipe.model.path)  # before imports that take seconds
    from safelora_fast.models.quiet_libraries import quiet_libraries

    with quiet_libraries():
        from safelora_fast.recipe.prepare import prepare
        from safelora_fast.recipe.run import leave_processes
        from safelora_fast.recipe.run import train as run
        from safelora_fast.recipe.summary_text import plan_lines

        prepared = prepare(recipe)
        if dry_run and main:
            _check_output(folder, prepared, resume=resume, overwrite=overwrite)
        if talks and not as_json:
            lines = plan_lines(prepared)
            width = max(len(label) for label, _ in lines)
            say(*(f"{label:<{width}}  {text}" for label, text in lines))
        if dry_run:
            if talks and as_json:
                typer.echo(to_json(prepared.plan.to_dict()))
            elif talks:
                typer.echo("dry run: no weight was loaded and nothing was written; ≈ marks estimates")
            return
        words = ["safelora-fast", "train", str(config), *(overrides or []), "--resume"]
        with ProgressBar() as progress:
            record = run(
                prepared, resume=resume, command=shlex.join(words), progress=progress if talks else None, talk=talks
            )
        leave_processes()
    _show_record(record, folder.path, as_json=as_json, talks=talks)


def _check_output(folder: RunFolder, prepared: Prepared, *, resume: bool, overwrite: bool) -> None:
    """Check the disk space, and warn if the run needs --resume or --overwrite."""
    from safelora_fast.cli.console import warn
    from safelora_fast.errors import OutputError

    folder.check(resume=resume, overwrite=not resume, nbytes=prepared.plan.disk_bytes)
    try:
        folder.check(resume=resume, overwrite=overwrite)
    except OutputError as needed:
        warn(str(needed))


def _show_record(record: dict[str, Any], path: Path, *, as_json: bool, talks: bool) -> None:
    if not talks:
        return
    from safelora_fast.cli.console import warn
    from safelora_fast.files.store import to_json
    from safelora_fast.recipe.run_metrics import shown

    if as_json:
        typer.echo(to_json(record))
        return
    for name, metric in record["metrics"].items():
        typer.echo(f"{name:<28}{shown(metric.get('first')):>10} → {shown(metric.get('last'))}")
    for warning in (record.get("projection") or {}).get("warnings") or []:
        warn(warning)
    say(f"{record['steps']} steps in {record['seconds']:.1f} s; written to {path}")


def _end_with(descriptor: int) -> None:
    """Send this process SIGTERM when the parent process ends, which closes this pipe."""

    def wait() -> None:
        while os.read(descriptor, 1):  # a Python file object would hold a lock at interpreter exit
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="end with stdin", daemon=True).start()
