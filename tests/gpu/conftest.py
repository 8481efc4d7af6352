"""GPU tests: real sizes against float64, the same bits every run, streams and graph capture; skipped without a GPU.

They need an installed wheel, torch and pytest, and build nothing: `make test-gpu`, which also runs the GPU tests of
tests/ops.
"""

from __future__ import annotations

import os

import pytest
import torch

from safelora_fast.ops import OPS
from safelora_fast.ops.base import gpu, served_by

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it older torch refuses deterministic products
DEVICE = gpu()


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if DEVICE is None:
                item.add_marker(pytest.mark.skip(reason="torch finds no GPU"))


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """Each backend in turn; skips those missing on this machine."""
    reason = OPS[0].backend(request.param).unsupported_reason(())
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with served_by(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Make torch.empty return NaN, so that unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def captured(device):
    """Capture a function in a CUDA graph, after one run that compiles and makes plans; return the replay's result."""
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")

    def run(function, change=lambda: None):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
        change()
        graph.replay()
        torch.cuda.synchronize(device)
        return result

    return run


@pytest.fixture
def on_two_streams(device):
    """Run a function on two streams at once, each with earlier work that its inputs do not wait for."""

    def run(function):
        module = getattr(torch, device.type)
        streams = [module.Stream(device) for _ in range(2)]
        results = []
        for stream in streams:
            stream.wait_stream(module.current_stream(device))
            with module.stream(stream):
                results.append(function())
        for stream in streams:
            module.current_stream(device).wait_stream(stream)
        module.synchronize(device)
        return results

    return run
