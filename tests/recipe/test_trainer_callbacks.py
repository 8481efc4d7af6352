"""What a training shows while it runs."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from tiny_recipe import write_recipe

from safelora_fast.recipe.recipe import load_recipe
from safelora_fast.recipe.trainer_arguments import trainer_arguments
from safelora_fast.recipe.trainer_callbacks import Reporter


class Terminal(io.StringIO):
    """Standard error of somebody at a terminal."""

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
def test_the_figures_are_whole_on_a_narrow_terminal_as_soon_as_they_are_known(monkeypatch, width):
    state = SimpleNamespace(global_step=1, max_steps=1000, is_world_process_zero=True)
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    with Reporter(talk=True) as reporter:
        reporter.on_train_begin(None, state, None)
        reporter.on_step_end(None, state, None)
        reporter.on_log(None, state, None, logs=LOGS)
    shown = " ".join(screen.getvalue().split())
    for figure in ("loss 1.25", "kl 0.5", "feature_distance 0.75", "-0.125", "1/1000"):
        assert figure in shown
    assert "…" not in shown
    assert "time_share" not in shown


def test_the_first_step_is_logged(tmp_path):
    tiny = write_recipe(tmp_path)
    assert trainer_arguments(load_recipe(tiny.path, ["training.logging_steps=10"])).logging_first_step
    assert not trainer_arguments(load_recipe(tiny.path, ["training.logging_first_step=false"])).logging_first_step
