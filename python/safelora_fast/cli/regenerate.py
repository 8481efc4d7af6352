"""`safelora-fast regenerate`: have the model itself write the completions of safe examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safelora_fast.cli import options
from safelora_fast.cli.commands import refuse_unused
from safelora_fast.printable import say

if TYPE_CHECKING:
    from safelora_fast.selection.regenerate import Regeneration


def regenerate(
    pool: Annotated[
        Path, typer.Argument(metavar="POOL.jsonl", help="Examples with `messages`, or `prompt` and `completion`.")
    ],
    *,
    model: Annotated[str, typer.Option(metavar="PATH|HUB_ID[@REV]", help="The model before training.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The examples with new completions.")],
    adapter: options.OneAdapter = None,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 takes the most likely tokens.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sample among the most likely tokens whose probabilities sum to P.")
    ] = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of the completions.")] = 0,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Leave out completions that have not ended after N tokens.")
    ] = 512,
    min_tokens: Annotated[int, typer.Option(metavar="N", help="Leave out completions of fewer tokens.")] = 1,
    max_prompt: Annotated[int, typer.Option(metavar="N", help="Longer prompts are skipped and counted.")] = 2048,
    keep_refusals: Annotated[
        bool, typer.Option("--keep-refusals", metavar="", help="Keep completions that refuse.")
    ] = False,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Completions per batch.")] = 16,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    chat_template: options.ChatTemplate = None,
    template_args: options.TemplateArgs = None,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace an earlier output.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Replace the completions of safe examples by the model's own, to the same prompts (on-policy examples).

    Refusals, and completions that are cut off or too short, are left out. FILE.journal.jsonl keeps every completion: after an
    interruption, run the same command again to continue.

    Example: safelora-fast regenerate pool.jsonl --model M --output own.jsonl
    """
    from safelora_fast.errors import InterruptedRunError
    from safelora_fast.files.output import check_file
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.files.store import to_json
    from safelora_fast.models.model_settings import SubjectSettings
    from safelora_fast.models.templates import read_arguments

    if temperature == 0:
        refuse_unused("with --temperature 0", "top_p", "seed")
    settings = SubjectSettings(model, dtype, device, chat_template, trust_remote_code, read_arguments(template_args))
    check_file(output, [pool], overwrite=overwrite)
    folders = options.check_subject("regenerate", model, [] if adapter is None else [adapter])
    from safelora_fast.models.quiet_libraries import quiet_libraries

    with quiet_libraries():
        from safelora_fast.models.load import load_subject
        from safelora_fast.selection.regenerate import regenerate_completions

        subject = load_subject(settings, next(iter(folders), None))
        try:
            with ProgressBar(wanted=not (quiet or as_json), brief=True) as progress:
                report = regenerate_completions(
                    pool,
                    output,
                    model=subject.model,
                    tokenizer=subject.tokenizer,
                    temperature=temperature,
                    top_p=top_p,
                    seed=seed,
                    max_tokens=max_tokens,
                    min_tokens=min_tokens,
                    max_prompt=max_prompt,
                    keep_refusals=keep_refusals,
                    batch_size=batch_size,
                    overwrite=overwrite,
                    progress=progress,
                )
        except KeyboardInterrupt:
            raise InterruptedRunError(
                "interrupted; what is written is kept: run the same command again to continue"
            ) from None
    if as_json:
        typer.echo(to_json(report.to_dict()))
    elif not quiet:
        _show(report, output)


def _show(report: Regeneration, output: Path) -> None:
    for reason, places in report.skipped.items():
        say(f"skipped: {len(places):,} examples with {reason}, the first at {places[0]}")
    left_out = {"refusals": report.refusals, "unfinished": report.unfinished, "too short": report.short}
    if told := ", ".join(f"{number:,} {kind}" for kind, number in left_out.items() if number):
        say(f"left out: {told}")
    say(f"{report.written:,} of {report.rows:,} examples have a new completion; written to {output}")
