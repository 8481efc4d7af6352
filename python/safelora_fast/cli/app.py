"""The typer app with all commands."""

from __future__ import annotations

from typing import Annotated

import typer

from safelora_fast import __version__
from safelora_fast.cli import (
    bench,
    compare,
    demo,
    env,
    evaluate,
    examples,
    gate,
    inspect,
    margin,
    operator_swap,
    persona,
    project,
    project_model,
    regenerate,
    rejudge,
    screen,
    select,
    subspace,
    train,
)
from safelora_fast.cli.commands import Command, Group

app = typer.Typer(
    cls=Group,
    name="safelora-fast",
    help="Fast SafeLoRA projection against emergent misalignment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    del version


app.command("project", cls=Command)(project.project)
app.command("project-model", cls=Command)(project_model.project_model)
app.command("inspect", cls=Command)(inspect.inspect)
app.add_typer(subspace.app, name="subspace")
app.command("train", cls=Command)(train.train)
app.add_typer(persona.app, name="persona")
app.command("screen", cls=Command)(screen.screen)
app.command("regenerate", cls=Command)(regenerate.regenerate)
app.command("select", cls=Command)(select.select)
app.command("margin", cls=Command)(margin.margin)
app.add_typer(operator_swap.app, name="operator-swap")
app.command("evaluate", cls=Command)(evaluate.evaluate)
app.command("rejudge", cls=Command)(rejudge.rejudge)
app.command("compare", cls=Command)(compare.compare)
app.command("gate", cls=Command)(gate.gate)
app.command("env", cls=Command)(env.env)
app.command("bench", cls=Command)(bench.bench)
app.command("examples", cls=Command)(examples.examples)
app.command("demo", cls=Command)(demo.demo)
