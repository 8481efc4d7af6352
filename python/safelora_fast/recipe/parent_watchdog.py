"""A run that another process started for itself, and that is not to outlive it, however that process ends."""

from __future__ import annotations

import os
import signal
import threading


def end_with(descriptor: int) -> None:
    """Send this process SIGTERM once the descriptor has nothing more: of a pipe that the other process holds open as it lives."""

    def wait() -> None:
        while os.read(descriptor, 1):  # a reader of Python's would hold a lock when the interpreter ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="end with stdin", daemon=True).start()
