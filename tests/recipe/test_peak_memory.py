"""The peak of memory is that of the process that asks."""

from __future__ import annotations

import subprocess
import sys

from safelora_fast.recipe.peak_memory import peak_bytes, peak_resident


def test_the_peak_is_that_of_this_process():
    """A child of a large process does not begin with its parent's peak."""
    block = b"x" * 300_000_000
    assert peak_resident() > len(block)
    code = "from safelora_fast.recipe.peak_memory import peak_resident; print(peak_resident())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5e6 < int(run.stdout) < 200e6


def test_without_a_gpu_there_is_no_peak_on_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    peaks = peak_bytes()
    assert peaks["gpu"] is None
    assert peaks["resident"] > 1e7
