"""Lines of JSONL files, compared with a plain loop."""

from __future__ import annotations

import hashlib
import json
import os
import threading

import pytest

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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{}\n\n{"a": \n', "rows.jsonl:3: is not JSON"),
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
    assert [found.place(index) for index in range(len(found))] == [f"{tmp_path / 'pipe'}:{line}" for line in (1, 3)]
    assert [found.record(index) for index in range(len(found))] == [json.loads(TEXT), []]
    assert found.sha256() == hashlib.sha256(content.encode()).hexdigest()


def test_sha256_is_that_of_the_file(lines):
    assert lines("{}").sha256() == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
