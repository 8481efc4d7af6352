"""The command line: one file per command."""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from safelora_fast.files.progress import reports
from safelora_fast.printable import one_line

if TYPE_CHECKING:
    from types import FrameType
    from typing import TextIO

    import typer

BAD_INPUT = 2
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
BROKEN_PIPE = 141
PIPE_IS_GONE = "PacifyFlushWrapper"  # typer replaces standard output with this before it exits with 1
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}


def main() -> NoReturn:
    """Run the command line. Bad input gives one line and exit code 2, Ctrl-C 130, SIGTERM 143; there is no traceback."""
    reports.disabled = True  # commands print warnings themselves
    try:
        _open_closed_streams()
        code = _run()
    except KeyboardInterrupt:  # also during imports
        code = INTERRUPTED
    finally:
        reports.disabled = False
    if code == INTERRUPTED:
        print("interrupted; no partial output is left", file=sys.stderr)
    raise SystemExit(code)


def _run() -> int:
    import typer

    from safelora_fast.cli.app import app
    from safelora_fast.errors import InterruptedRunError, SafeLoraFastError

    usage_error: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]
    for number in (signal.SIGTERM, signal.SIGHUP):  # asked to stop, or the terminal was closed
        signal.signal(number, _terminate)
    for stream in (sys.stdout, sys.stderr):  # characters that the terminal cannot encode become "?"
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = app(prog_name="safelora-fast", standalone_mode=False) or 0
        sys.stdout.flush()  # write errors appear here, not when Python exits
        return code
    except InterruptedRunError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except SafeLoraFastError as error:
        _fail(str(error), error.exit_code)
    except usage_error as error:
        message = error.format_message()  # type: ignore[attr-defined]
        if not message:  # no arguments: typer has shown the help
            raise SystemExit(BAD_INPUT) from None
        context = error.ctx  # type: ignore[attr-defined]
        command = context.command_path if context else _command_path(app)
        _fail(f"{message.rstrip('. ')}; see {command} --help", BAD_INPUT)
    except typer.Abort:
        return INTERRUPTED
    except SystemExit:
        if type(sys.stdout).__name__ != PIPE_IS_GONE:
            raise
        raise SystemExit(BROKEN_PIPE) from None
    except BrokenPipeError:
        _let_go(sys.stdout)
        raise SystemExit(BROKEN_PIPE) from None
    except OSError as error:  # e.g. a path that the system rejects
        _fail(_words_of(error), BAD_INPUT)


def _open_closed_streams() -> None:
    """Replace closed streams by the null device, before an opened file gets their descriptors and the printed text.

    If standard output is closed, the command fails at once: after hours of work, the results would be lost.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        number = ("stdin", "stdout", "stderr").index(name)
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
        setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w"))
    if "stdout" in closed:
        _fail("standard output is closed; to discard what is printed, add > /dev/null", BAD_INPUT)


def _words_of(error: OSError) -> str:
    """Return a one-line message for an error of the operating system."""
    try:
        sys.stdout.flush()
    except OSError as full:
        _let_go(sys.stdout)
        return f"standard output cannot be written: {full.strerror}"
    reason = error.strerror or str(error)
    if isinstance(error.filename, str | bytes):
        return f"{os.fsdecode(error.filename)}: {reason}"
    return f"standard output, or a file, cannot be written: {reason}" if error.errno in CANNOT_WRITE else reason


def _let_go(stream: TextIO) -> None:
    """Redirect a stream to the null device, so that Python exits without an error about unwritten text."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _command_path(app: typer.Typer) -> str:
    """Return the command that was typed, for errors that occur before typer has resolved it."""
    from typer.main import get_command

    command: Any = get_command(app)
    path = ["safelora-fast"]
    for word in sys.argv[1:]:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        path.append(word)
    return " ".join(path)


def _fail(message: str, code: int) -> NoReturn:
    try:
        print(f"error: {one_line(message)}", file=sys.stderr)
    except OSError:
        _let_go(sys.stderr)
    raise SystemExit(code) from None


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise SystemExit(TERMINATED)
