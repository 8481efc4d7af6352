"""Install packages with pip and say what happens: large downloads with their sizes, then how many packages are in place.

Alone, pip prints hundreds of lines, or with `--quiet` nothing for minutes. The arguments are those of `pip install`.
"""

import re
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

LARGE = 20.0  # megabytes
SECONDS_BETWEEN_LINES = 15.0
UNITS = {"kB": 1e-3, "MB": 1.0, "GB": 1e3}
DOWNLOAD = re.compile(r"\s*(Downloading|Using cached) (?:\S*/)?([^/\s]+\.(?:whl|tar\.gz|zip)) \(([\d.]+) (kB|MB|GB)\)")


def say(text: str) -> None:
    """Print a line at once."""
    print(f"  {text}", flush=True)


def installed() -> int:
    """Return the number of packages in this environment."""
    return sum(1 for _ in Path(sysconfig.get_path("purelib")).glob("*.dist-info"))


def watch(stop: threading.Event, wanted: int) -> None:
    """Say every few seconds how many of the wanted packages are in place; pip itself is silent here."""
    before, start = installed(), time.monotonic()
    while not stop.wait(SECONDS_BETWEEN_LINES):
        say(
            f"{min(installed() - before, wanted)} of {wanted} packages installed after {time.monotonic() - start:.0f} s"
        )


def main(arguments: list[str]) -> int:
    """Run pip, and return its exit code."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--no-compile",
        "--progress-bar=off",
        *arguments,
    ]
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    stop, megabytes, found, wanted, printed = threading.Event(), 0.0, 0, 0, time.monotonic()
    for line in pip.stdout or ():
        found += line.startswith("Collecting ")
        if download := DOWNLOAD.match(line):
            verb, name, number, unit = download.groups()
            size = float(number) * UNITS[unit]
            megabytes += size
            if size >= LARGE:
                printed = time.monotonic()
                say(f"{'-'.join(name.split('-')[:2])}: {size:.0f} MB{' (cached)' if verb == 'Using cached' else ''}")
        elif line.startswith("Installing collected packages:"):
            wanted = line.count(",") + 1
            say(f"installing {wanted} packages ({megabytes / 1e3:.1f} GB compressed)")
            threading.Thread(target=watch, args=(stop, wanted), daemon=True).start()
        elif not wanted and time.monotonic() - printed > SECONDS_BETWEEN_LINES:
            printed = time.monotonic()
            say(f"{found} packages found, {megabytes / 1e3:.1f} GB")
    stop.set()
    return pip.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
