"""What every test may rely on."""

from __future__ import annotations

import gc
import os
import signal

import pytest
from command_line import call

__all__ = ["call", "hub"]

# A suite started in the background ignores Ctrl-C, and so would the commands that it starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("COLUMNS", None)  # processes that share the tests get the terminal's width, which tables would keep to


@pytest.fixture(autouse=True)
def precision_of_its_own():
    """Trainers of transformers before 5 leave their precision to whatever asks accelerate next."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


def pytest_collection_finish():
    """Leave what the tests have imported out of later collections: trainers collect often, and all of torch is looked at."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """What was left out is freed as usual when Python ends."""
    gc.unfreeze()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hub that serves two models, and one of a kind that is not read."""
    from hub_server import serve
    from plain_pair import write_model

    folders = {"some/aligned": write_model(tmp_path / "aligned", 1), "some/base": write_model(tmp_path / "base", 2)}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"PK")
    folders["some/old"] = tmp_path / "old"
    with serve(folders, tmp_path / "cache", monkeypatch) as served:
        yield served
