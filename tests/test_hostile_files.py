"""Mutated files: every reader accepts them or rejects them with one line and its own error class."""

from __future__ import annotations

import pytest
from hostile_files import faults
from hostile_kinds import GROUPS

ROUNDS = 8


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.filterwarnings("ignore")  # warnings of other libraries about mutated values
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, monkeypatch, group):
    monkeypatch.chdir(tmp_path)  # a mutated path may be relative
    fallen = {kind.name: found for kind in GROUPS[group](tmp_path) if (found := faults(kind, ROUNDS))}
    assert not fallen


@pytest.mark.parametrize("depth", [50, 200, 100_000])
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_the_depth_that_is_read(depth, opening):
    from safelora_fast.files.json_reader import parse_json

    closing = {b"[": b"]", b'{"a":': b"}"}[opening]
    text = opening * depth + b"1" + closing * depth
    if depth == 50:
        value = parse_json(text)
        while isinstance(value, list | dict):
            value = value[0] if isinstance(value, list) else value["a"]
        assert value == 1
        return
    with pytest.raises(ValueError, match=r"^is nested too deeply, in more than 100 levels$"):
        parse_json(text)
