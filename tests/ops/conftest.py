"""The tiers that the tests of an operation run on: every backend of this machine, and CUDA and Triton without a GPU.

A test that takes `tier` runs once on each backend of its module's OP, and makes its tensors on the device `tier`:
- by default: torch, the extension module, the CUDA kernels emulated on the CPU, and the GPU backends if there is a GPU;
- with TRITON_INTERPRET=1 (test_triton_interpreted.py starts such a process): only the Triton kernels, in Triton's
  interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch
from emulated_cuda import emulated

from safelora_fast.ops.base import gpu, served_by
from safelora_fast.ops.triton_runtime import interpreted

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it older torch refuses deterministic products
CPU, GPU = torch.device("cpu"), gpu()
TIERS = [("triton", CPU)] if interpreted() else [("eager", CPU), ("native", CPU), ("cuda", CPU)]
if GPU is not None and not interpreted():
    TIERS += [("triton", GPU), ("cuda", GPU)]


def pytest_configure(config):
    """Ignore numpy's overflow warnings: the interpreter uses numpy, and a GPU returns infinity silently."""
    if interpreted():
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")


def pytest_generate_tests(metafunc):
    if "tier" in metafunc.fixturenames:
        tiers = [
            pytest.param(tier, id=f"{tier[0]}-{tier[1]}", marks=pytest.mark.gpu if tier[1] == GPU else ())
            for tier in TIERS
            if tier[0] in metafunc.module.OP.names
        ]
        metafunc.parametrize("tier", tiers, indirect=True)


def pytest_collection_modifyitems(config, items):
    """With the interpreter, run only the tests that depend on the backend."""
    if interpreted():
        others = [item for item in items if "tier" not in item.fixturenames]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if "tier" in item.fixturenames]


@pytest.fixture
def tier(request, monkeypatch):
    """Make one backend serve; return the device of its tensors. torch.empty returns NaN, so unwritten output shows."""
    name, device = request.param
    if name == "cuda" and device == CPU:
        emulated(monkeypatch)
    elif device == GPU and (reason := request.module.OP.backend(name).unsupported_reason(())):
        pytest.skip(f"{name}: {reason}")
    torch.use_deterministic_algorithms(True, warn_only=device == GPU)
    with served_by(name):
        yield device
    torch.use_deterministic_algorithms(False)
