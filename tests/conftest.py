"""What every test may rely on."""

from __future__ import annotations

import gc
import os
import signal

import pytest

# A suite started in the background ignores Ctrl-C, and so would the commands that it starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
