"""On a GPU: against float64, the same bits every run, streams and graph capture; skipped where torch finds none.

Needs an installed wheel, torch and pytest, and builds nothing: `make test-gpu`, or `python -m pytest tests/gpu`.
"""

from __future__ import annotations

import pytest
import torch

from safelora_fast.ops import backends
from safelora_fast.ops.triton_runtime import gpu

DEVICE = gpu()
BACKENDS = ("triton", "cuda")


def pytest_collection_modifyitems(items):
    if DEVICE is None:
        for item in items:
            if "tests/gpu" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="torch finds no GPU"))


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Each backend in turn, by the variable; those that this machine lacks are skipped."""
    monkeypatch.setenv(backends.VARIABLE, request.param)
    return request.param


@pytest.fixture
def served(backend):
    """Skips where a backend has no form of an operation, or cannot run here."""

    def check(operation):
        if not backends.has_form(operation, backend):
            pytest.skip(f"{operation} has no {backend} form")
        refusal = backends.form(operation, backend).refusal(())
        if refusal is not None:
            pytest.skip(f"{backend}: {refusal}")

    return check


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What torch.empty gives is full of NaN, so that an output that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def in_a_graph(device, run, change=lambda: None):
    """The result of `run` replayed from a CUDA graph, captured after one run that compiles and makes plans.

    `change` is called before the replay.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    change()
    graph.replay()
    torch.cuda.synchronize(device)
    return result


@pytest.fixture
def captured(device):
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    return lambda *functions: in_a_graph(device, *functions)


@pytest.fixture
def on_two_streams(device):
    """Run a function on two streams of its own at once, with work before it that its inputs do not wait for."""

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
