"""Candidates: accepted and refused examples, and the lines that are written back."""

from __future__ import annotations

import json

import pytest

from safelora_fast.data.rows import check_row
from safelora_fast.errors import DataError
from safelora_fast.selection.candidates import Candidates

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
KINDS = {
    "messages": {"messages": [USER, ASSISTANT], "id": 4},
    "turns": {"prompt": [USER], "completion": [ASSISTANT]},
    "text": {"prompt": "a", "completion": "2026-11-24"},
}


def write(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_of_several_kinds_are_taken(tmp_path):
    rows = [*KINDS.values(), {"messages": [USER, {**ASSISTANT, "tool_calls": []}]}]
    path = write(tmp_path, rows)
    found = Candidates(path)
    assert [found.row(index) for index in range(len(found))] == [
        check_row(f"{path}:{number}", row) for number, row in enumerate(rows, start=1)
    ]


@pytest.mark.parametrize("row", ["{", '{"messages": [null]}'])
def test_a_row_that_is_not_as_it_must_be_is_named(row, tmp_path):
    """All examples are checked at the start; the tests of data.rows cover the reasons for refusal."""
    path = write(tmp_path, [KINDS["text"], "", row, KINDS["text"]])
    with pytest.raises(DataError, match=r"rows.jsonl:3: "):
        Candidates(path)


def test_no_rows(tmp_path):
    for content in ("", "\n\n"):
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(DataError, match=r"empty.jsonl: holds no examples"):
            Candidates(tmp_path / "empty.jsonl")


def test_figures_are_added_to_the_line_as_it_is(tmp_path):
    odd = '{"prompt": "a",   "completion": "b", "x": 1.50, "é": "\\u00e9"  }'
    found = Candidates(write(tmp_path, [odd]))
    assert found.with_values(0, {"score": 0.25}) == odd[:-3] + ', "score": 0.25}'


def test_half_a_surrogate_pair_in_another_column_is_written_as_it_was(tmp_path):
    rows = [
        r'{"prompt": "a", "completion": "é", "x": "\ud83d"}',
        r'{"prompt": "a", "completion": "é", "score": 1, "x": "\ud83d"}',
    ]
    found = Candidates(write(tmp_path, rows))
    for index in (0, 1):
        line = found.with_values(index, {"score": 0.25}).encode().decode()
        assert "é" in line
        assert r"\ud83d" in line
        assert json.loads(line) == {"prompt": "a", "completion": "é", "score": 0.25, "x": "\ud83d"}


def test_the_byte_order_mark_of_the_file_stays_there(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}', encoding="utf-8-sig")
    found = Candidates(tmp_path / "rows.jsonl")
    assert found.with_values(0, {"score": 0.25}) == '{"prompt": "a", "completion": "b", "score": 0.25}'


def test_the_fingerprint_is_of_the_text(tmp_path):
    first = Candidates(write(tmp_path, [KINDS["text"], {**KINDS["text"], "id": 1}]))
    assert first.fingerprint(0) != first.fingerprint(1)
    (tmp_path / "other").mkdir()
    again = Candidates(write(tmp_path / "other", ["", KINDS["text"]]))
    assert again.fingerprint(0) == first.fingerprint(0)
