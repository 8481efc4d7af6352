"""`safelora-fast inspect`: show the cosine and the gain of every module, and write nothing."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelora_fast.cli import options

if TYPE_CHECKING:
    from safelora_fast.projection.report import AdapterReport


@options.with_settings
def inspect(
    adapters: options.Adapters,
    aligned: options.Aligned,
    base: options.Base,
    settings: dict[str, Any],
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep", metavar="", help="Show how many modules each threshold would project, from the same pass."
        ),
    ] = False,
    as_json: options.Json = False,
    plot: options.Plot = None,
    quiet: options.Quiet = False,
) -> None:
    """Show the cosine and the gain of every adapted module; write nothing."""
    from rich.table import Table

    from safelora_fast.cli.console import out, print_module_tables, print_warnings
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.projection.project import project_adapter

    options.check_plot(plot)
    with ProgressBar(wanted=not (quiet or as_json)) as progress:
        report = project_adapter(
            adapters,
            aligned=aligned,
            base=base,
            output=None,
            **settings,
            progress=progress,
        )
    if plot is not None:
        from safelora_fast.projection.plot import plot_report

        plot_report(report, plot)
    sweeps = {adapter.adapter: thresholds(adapter) for adapter in report.adapters} if sweep else {}
    if as_json:
        content = report.to_dict()
        for adapter in content["adapters"] if sweep else []:
            adapter["sweep"] = [{"threshold": t, "projected": count} for t, count in sweeps[adapter["adapter"]]]
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    if not quiet:
        print_module_tables(report, most=None)
        for name, counts in sweeps.items():
            table = Table("threshold", "modules projected", title=name, title_justify="left", box=None, pad_edge=False)
            for step, count in counts:
                table.add_row(f"{step:.2f}", str(count))
            out.print(table)
    print_warnings(report)


def thresholds(adapter: AdapterReport) -> list[tuple[float, int]]:
    """Count the modules that each threshold from 0 to 1, in steps of 0.05, would project."""
    cosines = [module.cosine for module in adapter.modules if not math.isnan(module.cosine)]
    return [(step / 20, sum(cosine <= step / 20 for cosine in cosines)) for step in range(21)]
