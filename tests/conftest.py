"""Settings and fixtures for all tests."""

from __future__ import annotations

import gc
import os
import signal

import pytest
from command_line import call

__all__ = ["call", "hub"]

# Background processes ignore Ctrl-C. Without this line, so would the commands that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Parallel test workers get the terminal's width, which would change the width of tables.
os.environ.pop("COLUMNS", None)


@pytest.fixture(autouse=True)
def precision_of_its_own():
    """Reset the precision: trainers of transformers before 5 leave theirs to the next user of accelerate."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


def pytest_collection_finish():
    """Exclude imported modules from garbage collection: trainers collect often, and would scan all of torch."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Free the excluded objects as usual when Python ends."""
    gc.unfreeze()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve two models, and one in an unsupported format, as the Hub does."""
    from hub_server import serve
    from plain_pair import write_model

    folders = {"some/aligned": write_model(tmp_path / "aligned", 1), "some/base": write_model(tmp_path / "base", 2)}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"PK")
    folders["some/old"] = tmp_path / "old"
    with serve(folders, tmp_path / "cache", monkeypatch) as served:
        yield served
