"""`safelora-fast compare`: train, measure and compare defenses, in one report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safelora_fast.cli import options
from safelora_fast.cli.commands import refuse_unused

if TYPE_CHECKING:
    from rich.text import Text

    from safelora_fast.compare.comparison import CompareConfig
    from safelora_fast.compare.report import ComparisonReport

INCOMPLETE = 1


def compare(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="What to compare and measure; see docs/compare.md.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the file, e.g. seeds=[0,1,2]."),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", metavar="", help="Train and measure nothing; report existing results.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Retrain runs whose recipe or data have changed.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train defenses with several seeds, measure what each prevents, allows and costs, and write one report.

    The report is written as one HTML page, as Markdown and as JSON. A second run resumes where the first stopped. A failure
    is a marked cell, and the next run tries it again. Exit code 1: the report is written, but something in it failed or is
    not finished.
    """
    from safelora_fast.configuration.signatures import check_packages

    if report_only:
        refuse_unused("with --report-only", "overwrite")
    check_packages("compare")
    from safelora_fast.compare.config import load_config

    loaded = load_config(config, overrides or [])
    run_and_show(loaded, report_only=report_only, overwrite=overwrite, as_json=as_json, quiet=quiet)


def run_and_show(
    config: CompareConfig,
    *,
    report_only: bool = False,
    overwrite: bool = False,
    as_json: bool = False,
    quiet: bool = False,
) -> None:
    """Run a comparison, show its progress, and print the report.

    Raises:
        typer.Exit: with code 1 if something failed or is not finished.
    """
    from safelora_fast.cli.console import err
    from safelora_fast.compare import compare as room
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.files.store import to_json
    from safelora_fast.models.quiet_libraries import quiet_libraries

    talks = not (quiet or as_json)
    with quiet_libraries(), ProgressBar(wanted=talks, brief=True) as progress:
        if report_only:
            report = room.report_only(config)
        else:
            report = room.compare(
                config,
                overwrite=overwrite,
                talk=talks,
                progress=progress,
                announce=lambda line: err.print(line, markup=False, soft_wrap=True) if talks else None,
            )
    if as_json:
        typer.echo(to_json(report.to_dict()))
    elif not quiet:
        _show(report, config.output)
    if not report.complete:
        raise typer.Exit(INCOMPLETE)


def _show(report: ComparisonReport, output: Path) -> None:
    from safelora_fast.cli.console import err, figure_table, out, warn
    from safelora_fast.compare.cell_sources import failures
    from safelora_fast.compare.words import words

    say = words()
    shown = [column for column in report.columns if column.criterion != "cost" or column.key == "relative"]
    table = figure_table("", *(_in_lines(say.heading(column)) for column in shown))
    for row in report.rows:
        table.add_row(row.name, *(_in_lines(say.cell(row.cells.get(column.key), column)) for column in shown))
    out.print(table)
    for sentence in report.reading:
        out.print(sentence, soft_wrap=True)
    for origin in failures(report):
        line = f"{origin.place}, seed {origin.seed}, {origin.scope}: {origin.what}"
        err.print(line, markup=False, soft_wrap=True) if origin.pending else warn(line)
    out.print(f"written to {output / 'report.html'}, report.md and report.json", soft_wrap=True)


def _in_lines(text: str) -> Text:
    """A heading or a cell, with its brackets on lines of their own; as Text, because the console escapes line ends in strings."""
    from rich.text import Text

    from safelora_fast.printable import printable

    return Text(printable(text).replace(" [", "\n[").replace(" (", "\n("))
