"""`safelora-fast select`: choose safe examples to interleave, those that misaligned models find least likely."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safelora_fast.cli import options
from safelora_fast.printable import say

if TYPE_CHECKING:
    from safelora_fast.selection import Selection

NONE = "none"


def select(
    candidates: Annotated[
        Path, typer.Argument(metavar="CANDIDATES.jsonl", help="Examples with `messages`, or `prompt` and `completion`.")
    ],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[ADAPTER]...", help="More misaligned adapters, after --misaligned.")
    ] = None,
    *,
    model: Annotated[str, typer.Option(metavar="PATH|HUB_ID[@REV]", help="The aligned model.")],
    misaligned: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]ADAPTER",
            help="A PEFT adapter that makes it misaligned: DIR, HUB_ID or HUB_ID@REV; repeatable.",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The chosen examples, with their scores.")],
    hold_out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"The domain to defend; its adapter is left out. {NONE}: leave none out.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(metavar="K", help="Number of examples to choose.")] = 5000,
    no_refusals: Annotated[
        bool, typer.Option("--no-refusals", metavar="", help="Leave out refusals (Interleaving++).")
    ] = False,
    epsilon: Annotated[float, typer.Option(metavar="E", help="ε of the score.")] = 1.0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    strings: options.Strings = "chat",
    chat_template: options.ChatTemplate = None,
    template_args: options.TemplateArgs = None,
    trust_remote_code: options.TrustRemoteCode = False,
    max_length: options.MaxLength = 2048,
    tokens_per_batch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Maximum tokens of a batch. In float32 the result does not depend on it."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the scores (.png, .svg or .pdf).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace an earlier output.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Choose safe examples to interleave: those that misaligned models find least likely, relative to the aligned model.

    Score: (NLL under the misaligned models − NLL under the aligned model)/(NLL under the aligned model + ε), where NLL is the
    mean negative log-likelihood per completion token. FILE.journal.jsonl stores the likelihoods: after an interruption, run the
    same command again to continue.
    """
    from safelora_fast.checkpoints.resolver import named_adapter
    from safelora_fast.cli.console import err
    from safelora_fast.cli.options import check_subject
    from safelora_fast.errors import InterruptedRunError, SettingsError
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.models.model_settings import SubjectSettings
    from safelora_fast.models.templates import read_arguments

    if strings not in {"chat", "text"}:
        raise SettingsError(f"--strings is {strings!r}, it must be chat or text")
    settings = SubjectSettings(model, dtype, device, chat_template, trust_remote_code, read_arguments(template_args))
    adapters = [*misaligned, *(more or [])]
    check_subject("select", model)
    for adapter in adapters:
        named_adapter(adapter)
    from safelora_fast.models.quiet_libraries import quiet_libraries

    with quiet_libraries():
        from safelora_fast.models.load import load_subject
        from safelora_fast.plotting import check_plot
        from safelora_fast.selection import select_by_perplexity_gap
        from safelora_fast.selection.perplexity import read_adapters
        from safelora_fast.selection.report import plot_selection

        read_adapters(adapters)
        if plot is not None:
            check_plot(plot)
        subject = load_subject(settings)
        try:
            with ProgressBar(wanted=not (quiet or as_json), brief=True) as progress:
                selection = select_by_perplexity_gap(
                    candidates,
                    output,
                    model=subject.model,
                    tokenizer=subject.tokenizer,
                    misaligned=adapters,
                    hold_out=None if hold_out is None else [name for name in hold_out if name != NONE],
                    top=top,
                    no_refusals=no_refusals,
                    epsilon=epsilon,
                    strings=strings,  # type: ignore[arg-type]
                    max_length=max_length,
                    tokens_per_batch=tokens_per_batch,
                    overwrite=overwrite,
                    progress=progress,
                )
        except KeyboardInterrupt:
            raise InterruptedRunError(
                "interrupted; what is scored is kept: run the same command again to continue"
            ) from None
        if plot is not None:
            plot_selection(selection, plot)
    for warning in selection.warnings:
        err.print(f"[yellow]warning:[/] {warning}", soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(selection.to_dict(), indent=2, ensure_ascii=False))
    elif not quiet:
        _show(selection, output)


def _show(selection: Selection, output: Path) -> None:
    say(*selection.lines())
    for reason, places in selection.skipped.items():
        say(f"skipped: {len(places):,} examples with {reason}, the first at {places[0]}")
    if selection.refusals:
        typer.echo(f"left out: {selection.refusals:,} refusals")
    if selection.held_out:
        say(f"held out: {', '.join(selection.held_out)}")
    say(
        f"{len(selection.chosen):,} of {len(selection.scores):,} scored examples (of {selection.rows:,}) have a score of at least "
        f"{selection.cut:.4f}, under {', '.join(selection.adapters)}; written to {output}"
    )
