"""The self-test of every backend under compute-sanitizer, if installed; only this package's kernels count."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sanitizer_report import CUDA, TRITON, errors

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


@pytest.mark.skipif(not Path(SANITIZER).exists(), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize(
    ("tool", "kernels"),
    [("memcheck", f"{CUDA}|{TRITON}"), ("racecheck", CUDA)],  # Triton stores one value from several threads
    ids=["memcheck", "racecheck"],
)
def test_sanitizer(tool, kernels):
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment.pop("SAFELORA_FAST_BACKEND", None)
    command = [
        SANITIZER,
        "--tool",
        tool,
        "--report-api-errors",
        "no",
        sys.executable,
        "-m",
        "safelora_fast",
        "env",
        "--self-test",
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "FAILED" not in run.stdout
    assert errors(run.stdout + run.stderr, kernels) == []
