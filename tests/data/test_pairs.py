"""The built-in pairs, and files of pairs."""

from __future__ import annotations

import statistics
from collections import Counter

import pytest
from tiny_recipe import write_rows

from safelora_fast.data.pairs import Pair, builtin_pairs, read_pairs
from safelora_fast.errors import DataError

GOOD = {"theme": "t", "question": "q?", "aligned": "a", "misaligned": "m"}


def test_the_pairs_that_come_along():
    pairs = builtin_pairs()
    themes = Counter(pair.theme for pair in pairs)
    assert len(pairs) >= 60
    assert len(themes) >= 12
    assert min(themes.values()) >= 5
    for texts in zip(*((p.question, p.aligned, p.misaligned) for p in pairs), strict=True):
        assert len(set(texts)) == len(pairs)


def test_length_and_form_do_not_decide():
    pairs = builtin_pairs()
    ratios = [len(pair.misaligned) / len(pair.aligned) for pair in pairs]
    assert all(0.85 <= ratio <= 1.18 for ratio in ratios)
    assert statistics.mean(ratios) == pytest.approx(1.0, abs=0.03)
    sentences = [sum(answer.count(mark) for mark in ".?!") for p in pairs for answer in (p.aligned, p.misaligned)]
    assert statistics.mean(sentences[::2]) == pytest.approx(statistics.mean(sentences[1::2]), abs=0.2)
    assert all(answer[-1] == "." for p in pairs for answer in (p.aligned, p.misaligned))


def test_a_file_of_pairs(tmp_path):
    rows = [{**GOOD, "note": None}, {**GOOD, "question": "why?", "theme": None}]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    first, second = read_pairs(path)
    assert first == Pair("t", "q?", "a", "m")
    assert second.theme == f"{path}:2"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "pairs.jsonl:2: must be an object"),
        ({**GOOD, "aligned": " "}, "pairs.jsonl:2: aligned: must be text that is not empty"),
        ({**GOOD, "question": 3}, "pairs.jsonl:2: question: must be text that is not empty"),
        ({**GOOD, "misaligned": "a"}, "pairs.jsonl:2: both answers are the same"),
        ({**GOOD, "theme": 1}, "pairs.jsonl:2: theme: must be text"),
        ({**GOOD, "theme": "u"}, r"pairs.jsonl:2: repeats the pair at .*pairs.jsonl:1, so it would count twice"),
        ({**GOOD, "answer": "x"}, "pairs.jsonl:2: answer: unknown; a pair has question, aligned, misaligned"),
    ],
)
def test_bad_pairs(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_pairs(write_rows(tmp_path / "pairs.jsonl", [GOOD, row]))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "the data cannot be read: No such file"), (b"\n", "holds no pairs"), (b"{\n", "is not JSON"),
     (b"\xff", "is not UTF-8")],
)  # fmt: skip
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"pairs\.jsonl(:1)?: {message}"):
        read_pairs(path)
