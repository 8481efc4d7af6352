"""The command line: one file per command."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from types import FrameType

BAD_INPUT = 2
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
BROKEN_PIPE = 141


def main() -> NoReturn:
    """Run the command line: one line and exit code 2 for bad input, 130 for Ctrl-C, 143 when told to end; no traceback."""
    try:
        code = _run()
    except KeyboardInterrupt:  # while modules are still being imported, too
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("interrupted; no partial output is left", file=sys.stderr)
    raise SystemExit(code)


def _run() -> int:
    import typer

    from safelora_fast.cli.app import app
    from safelora_fast.errors import InterruptedRunError, SafeLoraFastError

    usage_error: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]
    for number in (signal.SIGTERM, signal.SIGHUP):  # told to end, or the terminal is gone
        signal.signal(number, _terminate)
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a sign shows another in its place
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        return app(prog_name="safelora-fast", standalone_mode=False) or 0
    except InterruptedRunError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except SafeLoraFastError as error:
        _fail(str(error), error.exit_code)
    except usage_error as error:
        message = error.format_message()  # type: ignore[attr-defined]
        if not message:  # no arguments: the help has been shown
            raise SystemExit(BAD_INPUT) from None
        context = error.ctx  # type: ignore[attr-defined]
        command = context.command_path if context else "safelora-fast"
        _fail(f"{message.rstrip('. ')}; see {command} --help", BAD_INPUT)
    except typer.Abort:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(BROKEN_PIPE) from None


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code) from None


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise SystemExit(TERMINATED)
