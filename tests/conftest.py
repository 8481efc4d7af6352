"""What every test may rely on."""

from __future__ import annotations

import signal

# A suite started in the background ignores Ctrl-C, and so would the commands that it starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
