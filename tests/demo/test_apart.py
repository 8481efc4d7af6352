"""A training in a process of its own: its errors arrive as one line, and it ends when its parent turns away."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from demo_model import save_tiny

from safelora_fast.demo import apart
from safelora_fast.demo.recipe import Recipe
from safelora_fast.demo.variants import Variant
from safelora_fast.errors import SafeLoraFastError


@pytest.fixture
def task(tmp_path):
    source = save_tiny(tmp_path / "source")
    (tmp_path / "folder").mkdir()
    recipe = Recipe(adapter_epochs=1, rank=4)
    return apart.Task(Variant("plain"), recipe, 3, source, source, tmp_path / "none.safetensors", tmp_path / "folder")


def test_a_task_survives_its_journey(task):
    task = replace(task, variant=Variant("all", 0.1, 1.0, 2.0, 0.3))
    assert apart.Task.load(task.dump()) == task


def test_a_bad_input_is_one_line(task):
    """The subspace is missing, which the child finds out."""
    task = replace(task, variant=Variant("penalty", subspace_penalty=1.0))
    with pytest.raises(SafeLoraFastError, match=r"^penalty: .*none\.safetensors: the subspace cannot be read") as found:
        apart.train_apart(task, lambda *_: None)
    assert "\n" not in str(found.value)


def test_a_killed_child_is_named(task, monkeypatch):
    monkeypatch.setattr(
        apart, "COMMAND", [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    )
    with pytest.raises(SafeLoraFastError, match="plain: its training was killed by signal 9; is there enough memory"):
        apart.train_apart(task, lambda *_: None)


def test_an_interrupt_ends_the_child(task):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apart.train_apart(task, interrupt)
    assert list(task.folder.iterdir()) == []


def test_a_child_without_a_parent_ends(task):
    """Nobody reads its messages: it stops instead of training on."""
    with subprocess.Popen(
        apart.COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        child.stdout.close()
        child.stdin.write(task.dump().encode())
        child.stdin.close()
        errors = child.stderr.read().decode()
        child.wait(timeout=120)
    assert child.returncode != 0
    assert "Traceback" not in errors
    assert list(task.folder.iterdir()) == []
