"""Lines of JSONL files against a plain loop, and what Arrow and a loop make of odd ones."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow
import pytest

from safelora_fast.data import jsonl
from safelora_fast.data.jsonl import JsonLines
from safelora_fast.errors import DataError

SCHEMA = pyarrow.schema([("a", pyarrow.int64()), ("text", pyarrow.string())])


@pytest.fixture
def lines(tmp_path):
    def make(content):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return JsonLines(path)

    return make


@pytest.mark.parametrize(
    "content",
    ["", "\n", "{}", "{}\n", '{"a": 1}\n\n \t\n{"a": 2}', '\n{"a": 1}\r\n{"text": "é ☂"}\n\n', '  {"a": 1}  \n'],
    ids=repr,
)
@pytest.mark.parametrize("at_once", [1, 3, 1 << 20])
def test_lines_are_those_of_a_plain_loop(lines, content, at_once, monkeypatch):
    monkeypatch.setattr(jsonl, "AT_ONCE", at_once)
    found = lines(content)
    expected = [(n, line) for n, line in enumerate(content.encode().split(b"\n"), 1) if line.strip()]
    assert len(found) == len(expected)
    for index, (number, line) in enumerate(expected):
        assert found.place(index) == f"{found.path}:{number}"
        assert found.raw(index) == line.rstrip(b"\r")
        assert found.record(index) == json.loads(line)


def test_a_table_has_the_values_of_the_lines(lines, monkeypatch):
    monkeypatch.setattr(jsonl, "BLOCK", 64)
    random = np.random.default_rng(0)
    rows = [{"a": int(random.integers(1000)), "text": "x" * int(random.integers(90)), "other": [1]} for _ in range(50)]
    rows[7].pop("text")
    found = lines("\n\n".join(map(json.dumps, rows)))
    table = found.table(SCHEMA)
    assert table["a"].to_pylist() == [row["a"] for row in rows]
    assert table["text"].to_pylist() == [row.get("text") for row in rows]
    assert table.column_names == ["a", "text"]


def test_text_that_looks_like_a_date_stays_text(lines):
    assert lines('{"text": "2026-11-24"}\n').table(SCHEMA)["text"].to_pylist() == ["2026-11-24"]


@pytest.mark.parametrize(
    "content",
    [
        '{"a": 1}\n{"a": "one"}\n',
        '{"a": 1}\n{"a": \n',
        '{"a": 1}{"a": 2}\n',
        '{"a": 1}\n[1]\n',
        b'{"a": 1}\n{"text": "\xff"}\n',
        "",
    ],
    ids=["another type", "cut", "two on a line", "no object", "no UTF-8", "empty"],
)
def test_what_is_no_such_table_is_left_to_a_loop(lines, content):
    assert lines(content).table(SCHEMA) is None


@pytest.mark.parametrize("piece", [1, 2, 3, 7])
def test_text_is_told_from_other_bytes_wherever_pieces_end(lines, piece, monkeypatch):
    monkeypatch.setattr(jsonl, "PIECE", piece)
    text = '{"text": "é ☂ 🌧 plain"}\n'.encode()
    assert lines(text).table(SCHEMA)["text"].to_pylist() == ["é ☂ 🌧 plain"]
    for broken in (text.replace(b"\xa9", b" "), text.replace(b"\xc3", b"\xa9"), text + b"\xe2\x98"):
        assert lines(broken).table(SCHEMA) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{}\n\n{"a": \n', "rows.jsonl:3: is no JSON"),
        (b'{}\n"\xff"\n', "rows.jsonl:2: is not UTF-8 text"),
        ("{}\n" + "[" * 100_000, "rows.jsonl:2: is nested too deeply"),
    ],
)
def test_a_broken_line_is_named(lines, content, words):
    found = lines(content)
    with pytest.raises(DataError, match=words):
        found.record(1)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="the data cannot be read: No such file"):
        JsonLines(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="the data cannot be read: Is a directory"):
        JsonLines(tmp_path)


def test_what_a_file_holds(lines):
    found = lines('{"a": 1}\n{"tools": []}\n')
    assert found.holds(re.compile(b'"tool'))
    assert not found.holds(re.compile(b'"messages"'))
    assert not lines("").holds(re.compile(b'"'))
    assert lines("{}").sha256() == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
