"""`safelora-fast examples`: recipes and other YAML files that come with this package."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from safelora_fast.cli.commands import refuse_unused
from safelora_fast.printable import say


def examples(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The example to write. (default: list all)")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the recipe and its data.")] = Path(),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace files whose content differs.")
    ] = False,
) -> None:
    """List the recipes, the comparison and the policy that come with this package, or write one with its data."""
    from safelora_fast.examples import command_of, copy_example, names

    if name is None:
        refuse_unused("without the NAME of an example", "output", "overwrite")
        known = names()
        width = max(map(len, known))
        typer.echo("\n".join(f"{one:<{width}}  {what}" for one, what in known.items()))
        typer.echo("\nto write one into this folder: safelora-fast examples NAME")
        return
    written = copy_example(name.removesuffix(".yaml"), output, overwrite=overwrite)
    beside = f", with {', '.join(file.name for file in written[1:])}" if written[1:] else ""
    say(f"written to {written[0]}{beside}")
    where = "" if output == Path() else f"cd {shlex.quote(str(output))} && "
    say(f"{where}{command_of(written[0].stem)}")
