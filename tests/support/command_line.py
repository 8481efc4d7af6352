"""Runs the command line inside this process."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

from safelora_fast.cli import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch, capsys):
    """Return `call(*words)`, which runs the command line with these arguments and returns exit code and output."""

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["safelora-fast", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return Result(stopped.value.code or 0, out, err)

    return run
