"""The command line: one file per command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line: one line and exit code 2 for bad input, 130 for Ctrl-C, no traceback for either."""
    from safelora_fast.cli.app import app
    from safelora_fast.errors import SafeLoraFastError

    try:
        app(prog_name="safelora-fast")
    except SafeLoraFastError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
