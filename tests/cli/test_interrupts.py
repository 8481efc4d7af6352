"""Ctrl-C leaves nothing behind. After kill -9 the output is absent, and the next run completes it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from plain_pair import contents, run, start, write_pair


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Return a pair that keeps one thread busy for a second or more."""
    return write_pair(tmp_path_factory.mktemp("long"), scale=40, layers=8)


def stop(pair, number: signal.Signals):
    """Send a signal once a temporary output folder exists."""
    process = start(pair.command("--select", "all", "--threads", "1", "--operator", "orthogonal", "--energy", "0.99"))
    end = time.monotonic() + 60
    while not list(pair.output.parent.glob(".safe.partial-*/adapter_model.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_interrupted(long):
    code, out, err = stop(long, signal.SIGINT)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted; no partial output is left"
    assert "Traceback" not in err
    assert not long.output.parent.exists()


@pytest.mark.parametrize(
    "module", ["typer", "safelora_fast.cli.app", "rich.console", "safelora_fast.projection.project"]
)
def test_interrupted_while_modules_are_imported(tmp_path, module):
    """Ctrl-C in the first tenth of a second has the same effect."""
    pair = write_pair(tmp_path)
    program = (
        "import importlib.abc, sys\n"
        "class Interrupt(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from safelora_fast.cli import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program, *pair.command()], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted; no partial output is left\n")


def test_killed(long):
    code, _, _ = stop(long, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not long.output.exists()
    (left,) = long.output.parent.glob(".safe.partial-*")
    code, _, err = run(long.command("--select", "all", "--quiet"))
    assert code == 0
    assert err == f"warning: a run that was killed has left {left}: nothing reads it, delete it\n"
    assert left.exists()
    files = contents(long.output)
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "safelora_report.json"}
    json.loads(files["safelora_report.json"])


def test_terminated_by_the_job_scheduler(long):
    """Job schedulers stop a job with SIGTERM, which must be as clean as Ctrl-C."""
    before = set(long.output.parent.glob(".*")) if long.output.parent.exists() else set()
    if long.output.exists():
        for path in long.output.iterdir():
            path.unlink()
        long.output.rmdir()
    for leftover in before:
        for path in leftover.iterdir():
            path.unlink()
        leftover.rmdir()
    code, out, err = stop(long, signal.SIGTERM)
    assert (code, out) == (143, "")
    assert "Traceback" not in err
    assert not long.output.exists()
    assert not list(long.output.parent.glob(".safe.partial-*"))
