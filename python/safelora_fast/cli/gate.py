"""`safelora-fast gate`: check the results of the other commands against a policy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer

from safelora_fast.cli import options
from safelora_fast.printable import say

BLOCKED = 1
PACKAGES = {"pydantic": "pydantic", "yaml": "pyyaml"}  # by module


def gate(
    policy: Annotated[Path, typer.Argument(metavar="POLICY.yaml", help="The limits; `examples policy` writes one.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the results.")],
    events: Annotated[
        bool,
        typer.Option("--events", metavar="", help="Print JSON lines, as a fine-tuning job's moderation_checks events."),
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check what evaluate, margin, compare, project and screen wrote against a policy's limits.

    A criterion passes only if the bad end of its 95 % interval is within the limit; otherwise it fails, or is not shown. A
    missing, damaged or stale result fails. The exit code is 0 if all pass, 1 if not, and 2 if the input is invalid.

    Example: safelora-fast gate policy.yaml runs/release
    """
    from safelora_fast.errors import MissingDependencyError, SettingsError, how_to_install

    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingDependencyError(f"gate needs {', '.join(missing)}: {how_to_install('gate')}")
    from safelora_fast.files.store import to_json
    from safelora_fast.gate.check import check_folder, line_of
    from safelora_fast.gate.policy import read_policy

    if events and as_json:
        raise SettingsError("--events and --json exclude each other")
    report = check_folder(read_policy(policy), folder)
    if events:
        for event in report.events():
            typer.echo(json.dumps(event, ensure_ascii=False))
    elif as_json:
        typer.echo(to_json(report.to_dict()))
    elif not quiet:
        say(*map(line_of, report.outcomes), f"{report.subject}: {report.summary}")
    if not report.passes:
        raise typer.Exit(BLOCKED)
