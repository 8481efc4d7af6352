"""`safelora-fast rejudge`: have other judges score stored answers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from safelora_fast.cli import options
from safelora_fast.printable import say


def rejudge(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="An Inspect log, or a folder of `evaluate`.")],
    judge: Annotated[
        list[str],
        typer.Option(metavar="PROVIDER/MODEL", help="A judge's Inspect name; repeatable."),
    ],
    judge_url: Annotated[str | None, typer.Option(metavar="URL", help="The endpoint of all these judges.")] = None,
    judge_attempts: options.JudgeAttempts = 4,
    judge_tokens: options.JudgeTokens = 64,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for all results. (default: next to the log, with .rejudged)"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace results of other answers.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Have other judges score stored answers, and show how well all judges agree.

    Each verdict is stored at once: a second run judges only answers without a score.
    """
    from safelora_fast.cli.evaluate import greet
    from safelora_fast.cli.verdicts import end_where_nothing_is_scored, show_agreement, show_judges
    from safelora_fast.errors import SettingsError
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.judging.judge_names import check_inspect, find_judge

    if judge_attempts < 1 or judge_tokens < 1:
        raise SettingsError("--judge-attempts and --judge-tokens must be at least 1")
    check_inspect()
    from safelora_fast.files.store import to_json, write_json
    from safelora_fast.judging.evaluate import judge_folder
    from safelora_fast.judging.evaluation_folder import REPORT, EvaluationFolder
    from safelora_fast.judging.rates import report_of
    from safelora_fast.judging.rejudge import compare_judges, read_log

    found = [find_judge(name, judge_url) for name in judge]
    judged = read_log(log)
    target = judged.file.with_suffix(".rejudged") if output is None else output
    folder = EvaluationFolder(target)
    folder.begin({"log": judged.file.name, "answers_sha256": judged.sha256}, overwrite=overwrite)
    known = folder.stored()
    folder.add(answer for answer in judged.answers if answer.asked.id not in known)
    verdicts = {judged.judge: judged.verdicts}
    with ProgressBar(wanted=not (quiet or as_json)) as progress:
        for name, model in zip(judge, found, strict=True):
            given, _ = judge_folder(
                folder,
                model,
                attempts=judge_attempts,
                reply_tokens=judge_tokens,
                log=judged.log,
                before=functools.partial(greet, name, judge_url, judge_tokens),
                progress=progress,
            )
            unique = str(model)
            while unique in verdicts:  # the same judge more than once
                unique += " again"
            verdicts[unique] = [given[answer.asked.id] for answer in judged.answers]
    reports = {name: report_of(name, some) for name, some in verdicts.items()}
    content: dict[str, Any] = {
        "log": judged.file.name, "of": judged.subject, "judges": reports, "agreement": compare_judges(verdicts),
    }  # fmt: skip
    write_json(target / REPORT, content)
    if as_json:
        typer.echo(to_json(content))
    elif not quiet:
        show_judges(reports)
        show_agreement(content["agreement"])
        say(f"written to {target}")
    end_where_nothing_is_scored({name: report for name, report in reports.items() if name != judged.judge})
