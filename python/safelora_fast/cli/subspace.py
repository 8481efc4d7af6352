"""`safelora-fast subspace`: build the safe subspace of two checkpoints, or show one."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safelora_fast.cli import options
from safelora_fast.cli.commands import Command, Group

if TYPE_CHECKING:
    from rich.table import Table

    from safelora_fast.subspace.module_subspace import ModuleSubspace
    from safelora_fast.subspace.safe_subspace import SafeSubspace

app = typer.Typer(
    cls=Group, no_args_is_help=True, help="Build the safe subspace that in-training defenses project onto, or show one."
)


@app.command("build", cls=Command)
def build(
    aligned: Annotated[
        str, typer.Option(metavar="PATH|HUB_ID[@REV]", help="The aligned model that training starts from.")
    ],
    base: options.Base,
    output: Annotated[Path, typer.Option(metavar="FILE", help="The safetensors file to write.")],
    rank: Annotated[
        int | None, typer.Option(metavar="K", help="Number of leading singular vectors of V to keep. (default: 64)")
    ] = None,
    energy: Annotated[float | None, typer.Option(metavar="E", help="Share of ‖V‖² to keep, instead of --rank.")] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,NAME]",
            help="Last parts of module names, e.g. q_proj,mlp.down_proj. (default: every linear weight of the layers, "
            "except experts)",
        ),
    ] = None,
    exclude: options.Exclude = None,
    seed: Annotated[int, typer.Option(help="Seed of the random start.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace an existing file.")] = False,
    as_json: options.Json = False,
    threads: options.Threads = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cuda|cuda:N|xpu|cpu", help="Compute on this device with torch. (default: the CPU, without torch)"
        ),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Build the safe subspace of two checkpoints.

    For each module, the file holds the leading left singular vectors of V = aligned - base, their singular values and the norm
    of V. It also records its sources and settings. Both checkpoints are streamed once, and no model is loaded.
    """
    from safelora_fast.checkpoints.sources import A_MODEL
    from safelora_fast.cli.console import out, warn_of_abandoned
    from safelora_fast.files.argument_checks import check_path
    from safelora_fast.files.output import check_file
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.subspace.safe_subspace import SafeSubspace

    for role, model in (("aligned", aligned), ("base", base)):
        check_path(role, model, A_MODEL)
    inputs = [path for path in map(Path, (aligned, base)) if path.exists()]
    check_file(output, inputs, overwrite=overwrite)
    warn_of_abandoned(output)
    names = None if not modules else [name.strip() for names in modules for name in names.split(",")]
    with ProgressBar(wanted=not (quiet or as_json)) as progress:
        subspace = SafeSubspace.build(
            aligned=aligned,
            base=base,
            modules=names,
            rank=rank,
            energy=energy,
            exclude=exclude,
            seed=seed,
            threads=threads,
            device=device,
            progress=progress,
        )
    subspace.save(output)
    if as_json:
        typer.echo(json.dumps(subspace.to_dict(), indent=2, ensure_ascii=False))
    elif not quiet:
        out.print(_by_ending(subspace))
        out.print(f"written to {output} ({output.stat().st_size / 1e6:.3g} MB)", soft_wrap=True)
    _warn(subspace)


@app.command("show", cls=Command)
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File that subspace build wrote.")],
    as_json: options.Json = False,
) -> None:
    """Show the sources and settings of a subspace, and the energy that it keeps of every module."""
    from safelora_fast.cli.console import out
    from safelora_fast.subspace.safe_subspace import SafeSubspace

    subspace = SafeSubspace.load(file)
    if as_json:
        typer.echo(json.dumps(subspace.to_dict(), indent=2, ensure_ascii=False))
        return
    for role, source in subspace.sources.items():
        revision = f" at {source['revision']}" if source.get("revision") else ""
        out.print(f"{role:<8} {source.get('source', 'unknown')}{revision}", soft_wrap=True)
    given = (f"{name} {value}" for name, value in subspace.settings.items() if value is not None)
    out.print(f"{'built':<8} with {', '.join(given)}", soft_wrap=True)
    out.print(_of_modules(subspace))
    _warn(subspace)


def _by_ending(subspace: SafeSubspace) -> Table:
    """Return a table of the energy kept, grouped by the last part of module names."""
    from safelora_fast.cli.console import figure_table

    groups: dict[str, list[ModuleSubspace]] = defaultdict(list)
    for name, module in subspace.modules.items():
        if module.rank:
            groups[name.rpartition(".")[2]].append(module)
    table = figure_table("modules", "count", "rank", "energy kept: least", "median", "most")
    for ending, modules in groups.items():
        ranks, energies = [module.rank for module in modules], [module.energy for module in modules]
        rank = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"
        spread = (min(energies), statistics.median(energies), max(energies))
        table.add_row(ending, str(len(modules)), rank, *(f"{energy:.3f}" for energy in spread))
    return table


def _of_modules(subspace: SafeSubspace) -> Table:
    from safelora_fast.cli.console import figure, figure_table, short

    table = figure_table("module", "shape", "rank", "energy kept", "σ₁", "‖V‖")
    for name, module in subspace.modules.items():
        shape = f"{len(module.left_vectors)}×{module.columns}"
        values = (figure(value) for value in (module.spectral_norm, module.v_norm))
        table.add_row(short(name, 32), shape, str(module.rank), figure(module.energy), *values)
    return table


def _warn(subspace: SafeSubspace) -> None:
    """Warn about unrelated models and about modules without a subspace."""
    from safelora_fast.checkpoints.weight_norms import far_apart
    from safelora_fast.cli.console import warn

    if apart := far_apart(subspace.settings.get("median_v_ratio") or 0.0):
        warn(apart)
    zero = [name for name, module in subspace.modules.items() if not module.rank]
    if zero:
        more = f" and {len(zero) - 1} more" if len(zero) > 1 else ""
        warn(f"V is zero in {zero[0]}{more}: there is nothing to project onto, and defenses leave such modules alone")
