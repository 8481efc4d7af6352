"""`safelora-fast project-model`: project a full fine-tune."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from safelora_fast.cli import options
from safelora_fast.errors import SettingsError


@functools.partial(options.with_settings, whole_model=True)
def project_model(
    settings: dict[str, Any],
    finetuned: Annotated[str, typer.Argument(metavar="FINETUNED", help="A full fine-tune: its path or Hub id.")],
    aligned: Annotated[str, typer.Option(metavar="PATH|HUB_ID[@REV]", help="The aligned model that was fine-tuned.")],
    base: Annotated[str | None, options.BASE] = None,
    subspace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file of `subspace build` instead of --base; for orthogonal, select all."),
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to create.")] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", metavar="", help="Project input embeddings and the head too.")
    ] = False,
    others: Annotated[
        str,
        typer.Option(metavar="finetuned|aligned", help="Where norms, biases, and other tensors come from."),
    ] = "finetuned",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Compute and report everything, write nothing.")
    ] = False,
    as_json: options.Json = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace an existing output, finished or not.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Project a full fine-tune onto the alignment subspace, shard by shard.

    Loads no model. Repeat the command after a kill: finished shards are not computed again. C needs 4·m·n·min(m, n)
    operations for a weight (m, n). --operator orthogonal with a small --rank and --select all does without C.
    """
    if output is None and not dry_run:
        raise SettingsError("say where to write with --output DIR, or pass --dry-run")
    from rich.filesize import decimal

    from safelora_fast.cli.console import out, print_module_tables, print_warnings
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.subspace.safe_subspace import SafeSubspace
    from safelora_fast.whole_models.project_model import project_model

    if (base is None) == (subspace is None):
        raise SettingsError("give either --base, or a subspace of the two models with --subspace FILE")
    with ProgressBar(wanted=not (quiet or as_json)) as progress:
        report = project_model(
            finetuned,
            aligned=aligned,
            base=base,
            subspace=None if subspace is None else SafeSubspace.load(subspace),
            output=None if dry_run else output,
            embeddings=embeddings,
            others=others,  # type: ignore[arg-type]
            overwrite=overwrite,
            progress=progress,
            **settings,
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    elif not quiet:
        print_module_tables(report, most=10)
        rate = decimal(int(report.bytes_read / report.seconds))
        out.print(f"{decimal(report.bytes_read)} of weights in {report.seconds:.2f} s ({rate}/s)")
        out.print("dry run: nothing was written" if dry_run else f"written to {output}", soft_wrap=True)
    print_warnings(report)
