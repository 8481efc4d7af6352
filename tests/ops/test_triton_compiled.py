"""Every Triton kernel compiled for GPUs that need not be present: no spills, wide loads, tensor cores where intended.

Each architecture is a class, so that pytest-xdist runs them on different workers: each compilation takes about a
second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "support" / "triton_compilation.py"


@pytest.fixture(scope="class")
def compiled(request, tmp_path_factory):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), str(request.cls.architecture), request.cls.only]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


class Checks:
    """Checks for one architecture; `only` names the kernels that differ most between architectures."""

    architecture: int
    only = "bf16"
    fewest = 8

    def test_nothing_spills(self, compiled):
        assert len(compiled) >= self.fewest
        assert all(kernel["cubin"] > 1000 for kernel in compiled)
        assert [kernel["kernel"] for kernel in compiled if kernel["spills"]] == []

    def test_hidden_states_and_logits_are_read_16_bytes_at_a_time(self, compiled):
        for kernel in compiled:
            if kernel["kernel"].startswith(("token_sums", "gradients", "linear_loss")):
                assert any(".v4.b32" in load for load in kernel["loads"]), kernel

    def test_products_copy_16_bytes_at_a_time_and_use_tensor_cores(self, compiled):
        for kernel in compiled:
            if kernel["kernel"].startswith(("transposed_parts", "products")):
                assert kernel["copies_16"] or any(".v4.b32" in load for load in kernel["loads"]), kernel
                assert kernel["mma"], kernel


class TestAmpere(Checks):
    architecture = 80


class TestHopper(Checks):
    architecture = 90
    only = ""
    fewest = 20


class TestBlackwell(Checks):
    architecture = 100
