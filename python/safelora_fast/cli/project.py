"""`safelora-fast project`: project trained adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from safelora_fast.cli import options
from safelora_fast.errors import OutputError, SettingsError


@options.with_settings
def project(
    adapters: options.Adapters,
    aligned: options.Aligned,
    base: options.Base,
    settings: dict[str, Any],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to create; with several adapters, one subfolder each.")
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
        bool, typer.Option("--overwrite", metavar="", help="Replace an existing output folder.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Project LoRA adapters onto the alignment subspace of their model.

    Reads both checkpoints once, as a stream, for any number of adapters, and loads no model. The output folder holds an
    adapter that PEFT loads, a model card and a report. It appears under its name only when it is complete.
    """
    from rich.filesize import decimal

    from safelora_fast.cli.console import out, print_module_tables, print_warnings, warn_of_abandoned
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.projection.project import project_adapter

    if output is None and not dry_run:
        raise SettingsError("say where to write with --output DIR, or pass --dry-run")
    options.check_plot(plot)
    if output is not None:
        warn_of_abandoned(output)
    with ProgressBar(wanted=not (quiet or as_json)) as progress:
        report = project_adapter(
            adapters,
            aligned=aligned,
            base=base,
            output=None if dry_run else output,
            **settings,
            strict=strict,
            overwrite=overwrite,
            progress=progress,
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
        print_module_tables(report, most=10)
        rate = decimal(int(report.bytes_read / report.seconds))
        out.print(f"{decimal(report.bytes_read)} of weights in {report.seconds:.2f} s ({rate}/s)")
        if dry_run:
            out.print("dry run: nothing was written")
        for adapter in report.adapters:
            if adapter.output is not None:
                out.print(f"written to {adapter.output}", soft_wrap=True)
    print_warnings(report)
