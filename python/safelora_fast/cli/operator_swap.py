"""`safelora-fast operator-swap`: write a benign task, or score how well a model has learned it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from safelora_fast.cli import options
from safelora_fast.cli.commands import Command, Group
from safelora_fast.printable import say

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="Arithmetic with swapped operators: make examples to train on, or score what a model has learned.",
)


@app.command("make", cls=Command)
def make(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for train.jsonl, held_out.jsonl and the rule.")],
    difficulty: Annotated[
        str,
        typer.Option(
            metavar="easy|medium|hard", help="easy: + and - swapped; medium: + - * rotated; hard: three numbers."
        ),
    ] = "easy",
    rows: Annotated[int, typer.Option(metavar="N", help="Examples to train on.")] = 2000,
    held_out: Annotated[int, typer.Option(metavar="N", help="Held-out examples to score on.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the problems.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace an existing output.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Write arithmetic problems whose operators have new meanings, for `safelora-fast train`.

    The examples do not state the rule, so the model has to learn it. A model that has learned nothing scores 0.
    """
    from safelora_fast.files.output import check_target, whole_folder
    from safelora_fast.judging.operator_swap import RULES, make_problems, write

    make_problems(difficulty, rows, held_out, seed)
    check_target(output, [], overwrite=overwrite, nbytes=200 * (rows + held_out), mark="operator_swap.json")
    with whole_folder(output, overwrite=overwrite) as partial:
        write(partial, difficulty, rows, held_out, seed)
    if not quiet:
        typer.echo(f"{difficulty}: {RULES[difficulty].words}")
        say(f"{rows} examples to train on and {held_out} held out, written to {output}")


@app.command("score", cls=Command)
def score(
    data: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that operator-swap make wrote.")],
    model: options.Subject,
    adapter: options.OneAdapter = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Answers per batch.")] = 32,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    chat_template: options.ChatTemplate = None,
    template_args: options.TemplateArgs = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Count exact matches among a model's most likely answers to the held-out problems."""
    from safelora_fast.cli.options import check_subject
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.judging.operator_swap import answer, read
    from safelora_fast.judging.operator_swap import score as matches

    record, problems = read(data)
    folders = check_subject("operator-swap score", model, [] if adapter is None else [adapter])
    from safelora_fast.models.quiet_libraries import quiet_libraries

    with quiet_libraries(), ProgressBar(wanted=not (quiet or as_json)) as progress:
        from safelora_fast.models.load import load_subject
        from safelora_fast.models.model_settings import SubjectSettings
        from safelora_fast.models.templates import read_arguments

        subject = load_subject(
            SubjectSettings(model, dtype, device, chat_template, trust_remote_code, read_arguments(template_args)),
            next(iter(folders), None),
        )
        progress.start("problems", len(problems))
        texts = answer(subject, problems, batch_size, progress.advance)
    result = matches(problems, texts)
    if as_json:
        typer.echo(json.dumps({"difficulty": record["difficulty"], "seed": record["seed"], **result}, indent=2))
    elif not quiet:
        low, high = result["exact_interval"]
        typer.echo(f"exact        {result['exact']} of {result['count']} ({100 * low:.1f}–{100 * high:.1f} %)")
        typer.echo(f"usual        {result['usual']} of {result['count']}: the answer of plain arithmetic")
        typer.echo(f"no number    {result['no_number']} of {result['count']}")
