"""Silencing the progress bars and notices of other libraries."""

from __future__ import annotations

import contextlib
import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LIBRARIES = r"(transformers|trl|peft|accelerate|datasets|huggingface_hub|torch)(\..*)?"


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Disable progress bars, deprecation warnings and telemetry of other libraries; errors remain visible."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), datasets.are_progress_bars_disabled()
    loading_bars = logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", category=UserWarning, module=LIBRARIES)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if loading_bars:
                logging.enable_progress_bar()
            if not bars:
                datasets.enable_progress_bars()
