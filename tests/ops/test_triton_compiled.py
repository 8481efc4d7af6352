"""Every Triton kernel compiled for GPUs that are not there: no spills, wide loads, tensor cores where meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "support" / "triton_compilation.py"
ARCHITECTURES = [80, 90, 100]
READS_STATES = ("token_sums", "gradients")
MULTIPLIES = ("transposed_parts", "products")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), *map(str, ARCHITECTURES)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_all_kernels_for_all_architectures(compiled):
    names = [{kernel["kernel"] for kernel in compiled if kernel["architecture"] == number} for number in ARCHITECTURES]
    assert names[0] == names[1] == names[2]
    assert len(names[0]) * len(ARCHITECTURES) == len(compiled) >= 20 * len(ARCHITECTURES)
    assert all(kernel["cubin"] > 1000 for kernel in compiled)


def test_nothing_spills(compiled):
    assert [(kernel["kernel"], kernel["architecture"]) for kernel in compiled if kernel["spills"]] == []


def test_hidden_states_and_logits_are_read_16_bytes_at_a_time(compiled):
    for kernel in compiled:
        if kernel["kernel"].startswith((*READS_STATES, "linear_loss")):
            assert any(".v4.b32" in load for load in kernel["loads"]), kernel


def test_products_copy_16_bytes_at_a_time_and_use_tensor_cores(compiled):
    for kernel in compiled:
        if kernel["kernel"].startswith(MULTIPLIES):
            assert kernel["copies_16"] or any(".v4.b32" in load for load in kernel["loads"]), kernel
            assert kernel["mma"], kernel
