"""Triton kernels under Triton's interpreter, which is chosen when triton is imported: a process of its own.

tests/ops/test_triton_interpreted.py runs this folder in one; alone, as `TRITON_INTERPRET=1 pytest tests/interpreted`.
"""

from __future__ import annotations

import os

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_configure(config):
    """The interpreter computes with numpy, which warns where a GPU goes on with infinity."""
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def served_by_triton(monkeypatch):
    """Every operation goes to Triton or fails, and what torch.empty gives is full of NaN."""
    monkeypatch.setenv("SAFELORA_FAST_BACKEND", "triton")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
