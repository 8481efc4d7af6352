"""Lines of JSONL files against a plain loop, and which of them a loop must look at."""

from __future__ import annotations

import hashlib
import json
import os
import threading

import numpy as np
import pytest

from safelora_fast.data.rows import ROLES, check_row
from safelora_fast.errors import DataError
from safelora_fast.files import jsonl
from safelora_fast.files.jsonl import JsonLines

TEXT = '{"prompt": "a", "completion": "b"}'


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


@pytest.mark.parametrize("at_once", [1, 40, 1 << 20])
def test_odd_rows_are_known_by_their_index(lines, at_once, monkeypatch):
    monkeypatch.setattr(jsonl, "CHECKED_AT_ONCE", at_once)
    found = lines(f"{TEXT}\n\n{{}}\n{TEXT}\r\n \n  []\n" + f"{TEXT}\n" * 5 + "{")
    assert list(found.odd_rows()) == [1, 3, 9]
    assert list(lines("\n").odd_rows()) == list(lines("").odd_rows()) == []


@pytest.mark.parametrize("role", [*ROLES, "bot"])
def test_roles_are_those_of_rows(lines, role):
    odd = list(lines(json.dumps({"messages": [{"role": role, "content": ""}]})).odd_rows())
    assert odd == ([] if role in ROLES else [0])


def test_rows_that_are_not_odd_are_taken_by_a_loop(lines):
    """Rows with bytes replaced, left out or doubled: what the check lets pass is never refused later."""
    random = np.random.default_rng(0)
    turns = [
        {"role": "user", "content": 'é ☂ "quoted" \\ 🌧'},
        {"content": "b", "role": "assistant", "name": None},
    ]
    rows = [
        json.dumps(row, ensure_ascii=ascii_only).encode()
        for row in ({"messages": turns, "id": 1.5e3}, {"prompt": turns, "completion": turns[1:]}, json.loads(TEXT))
        for ascii_only in (True, False)
    ]
    made = []
    for number in range(20_000):
        row = bytearray(rows[number % len(rows)])
        for _ in range(int(random.integers(1, 3))):
            place = int(random.integers(len(row)))
            end = place + int(random.integers(0, 12))
            row[place:end] = bytes(
                random.choice([*b'"{}[]:,\\/ -0e1nu', 0, 9, 13, 128, 195, 255], int(random.integers(0, 2))).tolist()
            )
        made.append(bytes(row))
    found = lines(b"\n".join([*rows, *made]))
    odd = set(found.odd_rows())
    taken = [index for index in range(len(found)) if index not in odd]
    assert set(range(len(rows))) <= set(taken)
    assert len(rows) + 1000 < len(taken) < len(found) - 1000
    for index in taken:
        check_row(found.place(index), found.record(index))


@pytest.mark.parametrize(
    "more",
    ["NaN", "1e999", "9" * 5000, '"\\ud800"', "[" * 200 + "]" * 200],
    ids=["NaN", "inf", "long", "surrogate", "deep"],
)
def test_odd_values_are_left_to_a_loop(lines, more):
    assert list(lines(f'{TEXT[:-1]}, "x": {more}}}').odd_rows()) == [0]


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


def test_a_pipe_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    content = f"{TEXT}\n\n[]\n"
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(content,))
    writer.start()
    found = JsonLines(tmp_path / "pipe")
    writer.join()
    assert [found.place(index) for index in found.odd_rows()] == [f"{tmp_path / 'pipe'}:3"]
    assert [found.record(index) for index in range(len(found))] == [json.loads(TEXT), []]
    assert found.sha256() == hashlib.sha256(content.encode()).hexdigest()


def test_sha256_is_that_of_the_file(lines):
    assert lines("{}").sha256() == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
