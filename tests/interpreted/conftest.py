"""Setup for tests of the Triton kernels under Triton's interpreter.

The interpreter is selected when triton is imported, so these tests need a separate process.
tests/ops/test_triton_interpreted.py starts one; to run only this folder: `TRITON_INTERPRET=1 pytest tests/interpreted`.
"""

from __future__ import annotations

import os

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_configure(config):
    """Ignore NumPy's warnings in the interpreter about infinity, which a GPU handles silently."""
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def served_by_triton(monkeypatch):
    """Require the Triton backend for all operations, and fill the results of torch.empty with NaN."""
    monkeypatch.setenv("SAFELORA_FAST_BACKEND", "triton")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
