"""No kernel reads or writes beyond its operands: the pages next to them are protected."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_cuda import libraries

PROGRAM = Path(__file__).parents[1] / "support" / "guarded_cuda.py"


def run(*arguments):
    libraries()  # skips if they cannot be built
    return subprocess.run([sys.executable, PROGRAM, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("side", ["end", "start"])
def test_kernels_stay_within_their_operands(side):
    result = run(side)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("side", ["end", "start"])
def test_a_step_too_far_would_show(side):
    assert run(side, "overrun").returncode == -signal.SIGSEGV
