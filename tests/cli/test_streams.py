"""Closed and full streams (in separate processes), and paths that are not files: one line and the right exit code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

COMMAND = f"{sys.executable} -m safelora_fast"


def shell(words, folder):
    done = subprocess.run(["bash", "-c", words], check=False, capture_output=True, text=True, timeout=60, cwd=folder)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("env > /dev/full", 2, "error: standard output, or a file, cannot be written: No space left on device\n"),
        ("--version > /dev/full", 2, "error: standard output, or a file, cannot be written: No space left on device\n"),
        ("env >&-", 2, "error: standard output is closed; to discard what is printed, add > /dev/null\n"),
        ("project a --aligned b --base c --output d 2>&-", 2, ""),
        ("project a --aligned b --base c --output d 2> /dev/full", 2, ""),
        ("env 2>&- > /dev/null", 0, ""),
        ("env <&- > /dev/null", 0, ""),
    ],
)
def test_streams_that_are_closed_or_full(tmp_path, words, code, message):
    assert shell(f"{COMMAND} {words}", tmp_path) == (code, "", message)


def test_a_pipe_that_nobody_reads_any_more(tmp_path):
    code, _, message = shell(f"{COMMAND} env | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (code, message) == (141, "")


def test_closed_streams_give_no_file_their_numbers(pair):
    words = " ".join(map(str, pair.command()))
    assert shell(f"{COMMAND} {words} 2>&- <&- > /dev/null", pair.adapter.parent)[0] == 0
    weights = (pair.output / "adapter_model.safetensors").read_bytes()
    assert len(weights) == (pair.adapter / "adapter_model.safetensors").stat().st_size
    assert shell(f"{COMMAND} {words} --overwrite > /dev/null", pair.adapter.parent)[0] == 0
    assert (pair.output / "adapter_model.safetensors").read_bytes() == weights


@pytest.fixture
def no_files(tmp_path):
    """Return paths that are not files, by name."""
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    return {"circle": tmp_path / "circle", "pipe": tmp_path / "pipe", "device": "/dev/zero", "folder": tmp_path / "folder",
            "long": tmp_path / ("x" * 300)}  # fmt: skip


@pytest.mark.parametrize("kind", ["circle", "pipe", "device", "folder", "long"])
def test_paths_that_are_no_files_are_refused_in_one_line(call, no_files, pair, kind, monkeypatch):
    monkeypatch.setattr("safelora_fast.files.json_reader.SECONDS_FOR_A_WRITER", 0.01)
    path = no_files[kind]
    models = ("--aligned", pair.aligned, "--base", pair.base)
    for words in (
        ("project", path, *models, "--output", pair.output),
        ("project", pair.adapter, "--aligned", path, "--base", pair.base, "--output", pair.output),
        ("inspect", path, *models),
        ("subspace", "show", path),
        ("persona", "show", path),
        ("train", path),
        ("compare", path),
        ("margin", "--model", path),
        ("margin", "--model", pair.aligned, "--pairs", path),
        ("persona", "extract", pair.aligned, path, "--output", pair.output / "v.safetensors"),
        ("evaluate", "--model", path, "--output", pair.output),
        ("select", path, "--model", pair.aligned, "--misaligned", pair.adapter, "--output", pair.output),
        ("operator-swap", "score", path, "--model", pair.aligned),
    ):
        result = call(*words)
        assert result.code == 2, (words, result)
        assert result.err.startswith("error: "), (words, result)
        assert result.err.count("\n") == 1, (words, result)
    if kind in {"circle", "long"}:
        result = call(*pair.command(output=False), "--output", path)
        assert (result.code, result.err.count("\n")) == (2, 1), result


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read")
def test_a_folder_that_may_not_be_read(pair):
    """Another user may not find modules, and Python remembers that, so this runs in a separate process."""
    made = [parent for parent in pair.adapter.parents if Path(tempfile.gettempdir()) in parent.parents]
    for path in (*made, *pair.adapter.parent.rglob("*")):
        path.chmod(0o755)
    program = """
import os, sys
from safelora_fast import project_adapter
from safelora_fast.errors import SafeLoraFastError
adapter, aligned, base, locked, output = sys.argv[1:]
project_adapter(adapter, aligned=aligned, base=base, output=output)  # all that it imports is there
os.chmod(locked, 0)
os.seteuid(65534)
try:
    project_adapter(adapter, aligned=aligned, base=base, output=output, overwrite=True)
except SafeLoraFastError as error:
    print(type(error).__name__, error)
"""
    for locked, error in ((pair.aligned, "CheckpointError"), (pair.adapter, "AdapterError")):
        words = [*map(str, (pair.adapter, pair.aligned, pair.base, locked)), f"{pair.output}-{error}"]
        done = subprocess.run([sys.executable, "-c", program, *words], check=False, capture_output=True, text=True)
        locked.chmod(0o755)
        assert re.fullmatch(rf"{error} .*cannot be read: Permission denied\n", done.stdout), done.stderr
