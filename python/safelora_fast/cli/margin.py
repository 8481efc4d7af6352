"""`safelora-fast margin`: measure how strongly a model prefers misaligned answers, without a judge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safelora_fast.cli import options
from safelora_fast.cli.commands import refuse_unused

if TYPE_CHECKING:
    from rich.table import Table

    from safelora_fast.scoring.intervals import Interval
    from safelora_fast.scoring.margin import MarginReport

SMALLEST = 1e-12  # smaller values count as 0


def margin(
    model: options.Subject,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR|HUB_ID[@REV]", help="A PEFT adapter to measure in addition to the model; repeatable."
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSONL with question, aligned, misaligned, theme. (default: 72 built-in pairs)",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system prompt before every question.")] = None,
    strings: Annotated[
        str, typer.Option(metavar="chat|text", help="text is for models without a chat template.")
    ] = "chat",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    chat_template: options.ChatTemplate = None,
    template_args: options.TemplateArgs = None,
    trust_remote_code: options.TrustRemoteCode = False,
    tokens_per_batch: Annotated[
        int, typer.Option(metavar="N", help="Maximum tokens of a batch. The result does not depend on it.")
    ] = 4096,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure how strongly a model prefers misaligned answers to aligned ones; nothing is sampled or judged.

    Over pairs of answers to the same question, the margin is the mean difference of their log-likelihoods per token. The
    command also reports how often the misaligned answer is more likely. The model is measured alone, then with each adapter.
    """
    from safelora_fast.cli.options import check_subject
    from safelora_fast.data.pairs import builtin_pairs, read_pairs
    from safelora_fast.errors import SettingsError
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.files.store import to_json

    if strings not in {"chat", "text"}:
        raise SettingsError(f"--strings is {strings!r}, it must be chat or text")
    if strings == "text":
        refuse_unused("with --strings text", "chat_template", "template_args")
    chosen = builtin_pairs() if pairs is None else read_pairs(pairs)
    folders = check_subject("margin", model, adapter or [])
    from safelora_fast.models.quiet_libraries import quiet_libraries

    with quiet_libraries(), ProgressBar(wanted=not (quiet or as_json)) as progress:
        from safelora_fast.models.adapters import fit_adapter
        from safelora_fast.models.load import load_subject
        from safelora_fast.models.model_settings import SubjectSettings
        from safelora_fast.models.templates import read_arguments
        from safelora_fast.recipe.model_stamp import subject_stamp
        from safelora_fast.scoring.margin import answer_margin

        settings = SubjectSettings(
            model, dtype, device, chat_template, trust_remote_code, read_arguments(template_args)
        ).resolved()
        reports: dict[str, MarginReport] = {}
        stamps: dict[str, dict[str, str | None]] = {}
        for folder in (None, *folders):
            subject = load_subject(settings, folder)
            for named in folders if folder is None else []:
                fit_adapter(named, subject.model)  # an adapter that does not fit fails before the measurement
            name = f"./{folder}" if folder is not None and subject.name == "model" else subject.name
            stamps[name] = subject_stamp(settings.model, folder, settings.chat_template)
            progress.start(name, 2 * len(chosen))
            reports[name] = answer_margin(
                subject.model,
                subject.tokenizer,
                chosen,
                system=system,
                strings=strings,  # type: ignore[arg-type]
                tokens_per_batch=tokens_per_batch,
                seed=seed,
                progress=progress.advance,
            )
    if as_json:
        given = {
            "model": model,
            "dtype": settings.dtype,
            "device": settings.device,
            "system": system,
            "strings": strings,
        }
        source = "builtin" if pairs is None else str(pairs)
        typer.echo(to_json({**given, "pairs": source, "subjects": _to_dict(reports, stamps)}))
    elif not quiet:
        _show(reports)


def _to_dict(reports: dict[str, MarginReport], stamps: dict[str, dict[str, str | None]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, report in reports.items():
        change, interval = report.change_from(reports["model"])
        result[name] = {**stamps[name], **report.to_dict(), "change": change, "change_interval": interval.to_list()}
    return result


def _show(reports: dict[str, MarginReport]) -> None:
    from safelora_fast.cli.console import figure_table, out, short

    table = figure_table("subject", "margin, nats per token", "prefers the misaligned answer", "rise over the model")
    for name, report in reports.items():
        change, interval = report.change_from(reports["model"])
        share, count = report.share_interval, len(report.pairs)
        table.add_row(
            short(name),
            _signed(report.margin, report.margin_interval),
            f"{round(report.share * count)} of {count} ({100 * share.low:.0f}–{100 * share.high:.0f} %)",
            "–" if name == "model" else _signed(change, interval),
        )
    out.print(table)
    first = reports["model"]
    if len(first.by_theme) > 1 and len(first.by_theme) < len(first.pairs):
        out.print(_themes(reports))
    out.print("in parentheses: 95 % intervals over themes; above zero, misaligned answers are more likely")


def _themes(reports: dict[str, MarginReport]) -> Table:
    from safelora_fast.cli.console import figure_table, short

    table = figure_table("theme: margin", *(short(name, 24) for name in reports))
    for theme in reports["model"].by_theme:
        table.add_row(theme, *(f"{report.by_theme[theme][0]:+.3f}" for report in reports.values()))
    return table


def _signed(value: float, interval: Interval) -> str:
    """Format a value and its interval, with enough decimals to tell the value and the interval's width from 0."""
    sizes = [abs(value), interval.high - interval.low]
    decimals = max([4, *(-math.floor(math.log10(size)) for size in sizes if size > SMALLEST)])
    number, *ends = (f"{round(end, decimals) + 0.0:+.{decimals}f}" for end in (value, interval.low, interval.high))
    return number if math.isnan(interval.low) else f"{number} ({ends[0]} to {ends[1]})"
