"""Fixtures: the command line inside this process, and a pair of checkpoints."""

from __future__ import annotations

import pytest
from command_line import call
from plain_pair import write_pair

__all__ = ["call", "pair"]


@pytest.fixture
def pair(tmp_path):
    made = write_pair(tmp_path / "in")
    return type(made)(made.aligned, made.base, made.adapter, tmp_path / "out" / "safe")
