"""`safelora-fast screen`: measure training data before training, and flag suspicious examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safelora_fast.cli import options
from safelora_fast.cli.commands import refuse_unused
from safelora_fast.printable import say

if TYPE_CHECKING:
    from safelora_fast.screening.report import Screen

TOO_MANY = 1


def screen(
    data: Annotated[
        Path, typer.Argument(metavar="DATA.jsonl", help="Examples with `messages`, or `prompt` and `completion`.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The report, as JSON. A second run resumes.")],
    vector: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="A persona vector of the model; repeatable.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH|HUB_ID[@REV]", help="The model before training. (default: the vector's model)"),
    ] = None,
    layer: Annotated[int | None, typer.Option(metavar="N", help="Layer of the vectors. (default: suggested)")] = None,
    misaligned: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]ADAPTER", help="A PEFT adapter that makes the model misaligned; repeatable."),
    ] = None,
    own: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column with the model's own completion, as text.")
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Flag values above it; NAME is a trait, gap, or nll; repeatable."),
    ] = None,
    most: Annotated[float, typer.Option(metavar="SHARE", help="The share of examples that may be flagged.")] = 0.0,
    worst: Annotated[int, typer.Option(metavar="N", help="Number of examples to list.")] = 10,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    strings: options.Strings = "chat",
    chat_template: options.ChatTemplate = None,
    template_args: options.TemplateArgs = None,
    trust_remote_code: options.TrustRemoteCode = False,
    max_length: options.MaxLength = 2048,
    tokens_per_batch: Annotated[int | None, typer.Option(metavar="N", help="Maximum tokens of a batch.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace an earlier report.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Screen training data before training: completions along a persona vector, or that misaligned models find likely.

    With --model alone, it measures how unlikely the model finds them. With --own, values are differences to the model's own
    completions. The exit code is 1 if more than --most of the
    examples are above a --limit. FILE.journal.jsonl stores all values: after an interruption, run the same command again.

    Example: safelora-fast screen data.jsonl --vector malicious.safetensors --limit malicious=2 --output screen.json
    """
    from safelora_fast.cli.options import check_subject
    from safelora_fast.errors import InterruptedRunError, SettingsError
    from safelora_fast.files.output import check_file
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.files.store import to_json
    from safelora_fast.persona_vector import PersonaVector

    if strings not in {"chat", "text"}:
        raise SettingsError(f"--strings is {strings!r}, it must be chat or text")
    if not vector:
        refuse_unused("without --vector", "layer")
    if not limit:
        refuse_unused("without --limit", "most")
    limits: dict[str, float] = {}
    for name, value in map(_limit, limit or []):
        if name in limits:
            raise SettingsError(f"--limit names {name} twice: give each measure one limit")
        limits[name] = value
    check_file(output, [data], overwrite=overwrite)
    sources = {_source(PersonaVector.load(file)) for file in vector or []} - {None}
    if model is None and not vector:
        raise SettingsError("there is nothing to screen by: give a --vector, or the --model before training")
    if model is None and len(sources) != 1:
        raise SettingsError(f"the vectors name {len(sources) or 'no'} models: name the --model before training")
    named = model or str(sources.pop())
    check_subject("screen", named)
    from safelora_fast.models.quiet_libraries import quiet_libraries

    with quiet_libraries():
        from safelora_fast.models.load import load_subject
        from safelora_fast.models.model_settings import SubjectSettings
        from safelora_fast.models.templates import read_arguments
        from safelora_fast.screening.screen import screen as measure

        arguments = read_arguments(template_args)
        subject = load_subject(SubjectSettings(named, dtype, device, chat_template, trust_remote_code, arguments))
        try:
            with ProgressBar(wanted=not (quiet or as_json), brief=True) as progress:
                report = measure(
                    data,
                    output,
                    model=subject.model,
                    tokenizer=subject.tokenizer,
                    vectors=vector or [],
                    layer=layer,
                    misaligned=misaligned or [],
                    own=own,
                    limits=limits,
                    most=most,
                    worst=worst,
                    strings=strings,  # type: ignore[arg-type]
                    max_length=max_length,
                    tokens_per_batch=tokens_per_batch,
                    overwrite=overwrite,
                    progress=progress,
                )
        except KeyboardInterrupt:
            raise InterruptedRunError(
                "interrupted; what is measured is kept: run the same command again to continue"
            ) from None
    if as_json:
        typer.echo(to_json(report.to_dict()))
    elif not quiet:
        _show(report, output)
    if not report.passes:
        raise typer.Exit(TOO_MANY)


def _limit(word: str) -> tuple[str, float]:
    from safelora_fast.errors import SettingsError

    name, equals, value = word.rpartition("=")
    try:
        return name, float(value) if equals else float("")
    except ValueError:
        raise SettingsError(f"--limit {word!r} is not NAME=VALUE, e.g. malicious=2 or gap=0.1") from None


def _source(vector: object) -> str | None:
    model = getattr(vector, "provenance", {}).get("model") or {}
    source = model.get("source")
    return f"{source}@{model['revision']}" if source and model.get("revision") else source


def _show(report: Screen, output: Path) -> None:
    for measure in report.measures:
        say(*measure.lines())
    for reason, places in report.skipped.items():
        say(f"skipped: {len(places):,} examples with {reason}, the first at {places[0]}")
    say(f"written to {output}")
