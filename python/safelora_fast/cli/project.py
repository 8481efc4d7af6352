"""`safelora-fast project`: project trained adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelora_fast.cli import options
from safelora_fast.errors import OutputError, SettingsError

if TYPE_CHECKING:
    from safelora_fast.projection.report import ProjectionReport


@options.with_settings
def project(
    settings: dict[str, Any],
    adapters: Annotated[list[str] | None, options.ADAPTERS] = None,
    aligned: Annotated[str | None, options.ALIGNED] = None,
    base: Annotated[str | None, options.BASE] = None,
    subspace: options.Subspace = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder to create; with several adapters, one subfolder each."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="LIST.jsonl|DIR",
            help='A fleet: a list of {"id", "adapter", "output"?, "revision"?}, or a folder with adapters below it. '
            "Outputs that are there already are skipped.",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="With --from: project every N-th adapter, from I = 0. /N or nothing reads the rest from the variables of "
            "Slurm arrays, Kubernetes, torchrun, or SkyPilot.",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="With --from: adapters per pass over the checkpoints. (default 16)")
    ] = None,
    modules_shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Read the I-th of N shares of V, from I = 0, and write a part file to --output DIR, for --join.",
        ),
    ] = None,
    join: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Join the part files in this folder, instead of reading V."),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            metavar="",
            help="Refuse adapters with trained tensors other than lora_A and lora_B (modules_to_save, …).",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Compute and report everything, write nothing.")
    ] = False,
    as_json: options.Json = False,
    plot: options.Plot = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace existing outputs of these adapters.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Project LoRA adapters onto the alignment subspace of their model.

    Reads both checkpoints once, as a stream, for any number of adapters, and loads no model. The output folder holds an
    adapter that PEFT loads, a model card and a report. It appears under its name only when it is complete.
    """
    beside = dry_run or join is not None or plot is not None
    where = _models(aligned, base, subspace, join)
    if source is not None:
        if adapters or modules_shard is not None or beside or output is None:
            raise SettingsError(
                "--from needs --output DIR, and cannot be combined with named adapters, --modules-shard, --join, --dry-run, "
                "and --plot"
            )
        given = {**where, **settings, "strict": strict, "overwrite": overwrite}
        _fleet(source, output, shard, batch, as_json, quiet, given)
        return
    if shard is not None or batch is not None:
        raise SettingsError("--shard and --batch belong to a fleet: give its adapters with --from")
    if not adapters:
        raise SettingsError("name an adapter, or give a fleet with --from LIST.jsonl or --from DIR")
    if modules_shard is not None:
        given = {**where, **settings, "strict": strict, "overwrite": overwrite}
        _part(adapters, None if beside else output, modules_shard, as_json, quiet, given)
        return
    if output is None and not dry_run:
        raise SettingsError("say where to write with --output DIR, or pass --dry-run")
    from safelora_fast.cli.console import print_warnings, warn_of_abandoned
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.projection.project import project_adapter

    options.check_plot(plot)
    if output is not None:
        warn_of_abandoned(Path(output))
    with ProgressBar(wanted=not (quiet or as_json)) as progress:
        report = project_adapter(
            adapters,
            **where,
            output=None if dry_run else output,
            **settings,
            strict=strict,
            overwrite=overwrite,
            progress=progress,
            parts=join,
        )
    if plot is not None:
        from safelora_fast.projection.plot import plot_report

        try:
            plot_report(report, plot)
        except OutputError as error:
            raise OutputError(f"the picture failed, the projection is done: {error}") from error
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    elif not quiet:
        _print(report)
    print_warnings(report)


def _models(aligned: str | None, base: str | None, subspace: Path | None, join: Path | None) -> dict[str, Any]:
    """Return the arguments that say what V is. Both models are required without a subspace, and to join parts."""
    if join is not None and subspace is not None:
        raise SettingsError("--join needs both models: parts are not made from a subspace")
    if subspace is None:
        lacking = next((name for name, model in (("--aligned", aligned), ("--base", base)) if model is None), None)
        if lacking is not None:
            raise SettingsError(f"{lacking} is missing: give both models, or a subspace with --subspace FILE")
        return {"aligned": aligned, "base": base}
    from safelora_fast.subspace.safe_subspace import SafeSubspace

    return {"aligned": aligned, "base": base, "subspace": SafeSubspace.load(subspace)}


def _print(report: ProjectionReport) -> None:
    from rich.filesize import decimal

    from safelora_fast.cli.console import out, print_module_tables

    print_module_tables(report, most=10)
    rate = decimal(int(report.bytes_read / report.seconds))
    out.print(f"{decimal(report.bytes_read)} of weights in {report.seconds:.2f} s ({rate}/s)")
    if all(adapter.output is None for adapter in report.adapters):
        out.print("dry run: nothing was written")
    for adapter in report.adapters:
        if adapter.output is not None:
            out.print(f"written to {adapter.output}", soft_wrap=True)


def _part(
    adapters: list[str], output: str | None, shard: str, as_json: bool, quiet: bool, chosen: dict[str, Any]
) -> None:
    """Write the part file of a share of the modules."""
    from safelora_fast.cli.console import out
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.projection.fleet_shard import parse_shard
    from safelora_fast.projection.part_file import project_part
    from safelora_fast.projection.settings import Settings

    if output is None or "subspace" in chosen:
        raise SettingsError(
            "--modules-shard needs --output DIR and both models, and cannot be combined with --join, --dry-run, and --plot"
        )
    where = {name: chosen.pop(name) for name in ("aligned", "base", "overwrite")}
    part = parse_shard(shard)
    with ProgressBar(wanted=not (quiet or as_json)) as progress:
        path = project_part(adapters, Settings(**chosen), output=Path(output), shard=part, progress=progress, **where)
    if as_json:
        typer.echo(json.dumps({"part": str(path), "shard": str(part)}))
    elif not quiet:
        out.print(f"written to {path}", soft_wrap=True)


def _fleet(
    source: str, output: str, shard: str | None, batch: int | None, as_json: bool, quiet: bool, chosen: dict[str, Any]
) -> None:
    """Project a fleet. Exit with 1 if an adapter failed."""
    from safelora_fast.cli.console import err, out, warn
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.projection.fleet import BATCH, project_fleet
    from safelora_fast.projection.fleet_shard import parse_shard

    if (worker := parse_shard(shard)).source is not None:
        err.print(f"shard {worker}, from {worker.source}")
    with ProgressBar(wanted=not (quiet or as_json)) as progress:
        report = project_fleet(
            source,
            output=output,
            shard=str(worker),
            batch=BATCH if batch is None else batch,
            progress=progress,
            warn=warn,
            **chosen,
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    elif not quiet:
        out.print(str(report), soft_wrap=True)
    if report.failed:
        raise typer.Exit(1)
