"""Runs the Triton tests of tests/ops, and tests/interpreted, under Triton's interpreter.

Triton selects the interpreter at import, so each part is a separate process. Each is a class, so that pytest-xdist
runs them on different workers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1]


def run(*files):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("SAFELORA_FAST_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(TESTS / file) for file in files)]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


class TestFeatureDistance:
    def test_interpreted(self):
        run("ops/test_feature_distance.py")


class TestLinearKl:
    def test_interpreted(self):
        run("ops/test_linear_kl.py")


class TestSubspaceProjection:
    def test_interpreted(self):
        run("ops/test_subspace_projection.py")


class TestTrainingStepAndCheckpoints:
    def test_interpreted(self):
        run("interpreted/test_safe_modules_interpreted.py", "interpreted/test_device_interpreted.py")
