"""Metrics of a run: the progress bar, the summary of the log, and the peak memory of the process."""

from __future__ import annotations

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest

from safelora_fast.recipe.run_metrics import peak_bytes, peak_resident, shown, summarize
from safelora_fast.recipe.trainer import Reporter


class Terminal(io.StringIO):
    """A standard error stream that is a terminal."""

    def isatty(self):
        return True


LOGS = {
    "loss": 1.25,
    "defense/kl": 0.5,
    "defense/feature_distance": 0.75,
    "monitor/malicious_with_a_long_name": -0.125,
    "defense/time_share": 0.1,
}


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_metrics_are_whole_on_a_narrow_terminal_as_soon_as_they_are_known(monkeypatch, width):
    state = SimpleNamespace(global_step=1, max_steps=1000, is_world_process_zero=True)
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    with Reporter(talk=True) as reporter:
        reporter.on_train_begin(None, state, None)
        reporter.on_step_end(None, state, None)
        reporter.on_log(None, state, None, logs=LOGS)
    text = " ".join(screen.getvalue().split())
    for metric in ("loss 1.25", "kl 0.5", "feature_distance 0.75", "-0.125", "1/1000"):
        assert metric in text
    assert "…" not in text
    assert "time_share" not in text


def test_the_log_is_summarized():
    nan = float("nan")
    log = [{"loss": 2.0, "epoch": 1}, {"loss": 1.0, "monitor/a": nan}, {"eval_loss": 3.0, "monitor/a": 0.5}]
    assert summarize(log) == {
        "loss": {"first": 2.0, "last": 1.0, "mean": 1.5},
        "monitor/a": {"first": None, "last": 0.5, "mean": 0.5},
        "eval_loss": {"first": 3.0, "last": 3.0, "mean": 3.0},
    }
    assert (shown(None), shown(0.123456)) == ("–", "0.1235")


def test_the_peak_is_that_of_this_process(monkeypatch):
    """The peak of a child process does not include its parent's peak."""
    block = b"x" * 300_000_000
    assert peak_resident() > len(block)
    code = "from safelora_fast.recipe.run_metrics import peak_resident; print(peak_resident())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5e6 < int(run.stdout) < 200e6
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert peak_bytes()["gpu"] is None
