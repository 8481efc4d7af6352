"""Scores, and which responses count."""

from __future__ import annotations

import json
import math

import pytest
from personas import tiny_trait

from safelora_fast.errors import DataError, SettingsError
from safelora_fast.persona.response_filter import keep, read_scores
from safelora_fast.persona.responses import Response, requests


def some(empty=()):
    return [
        Response(request, () if request.id in empty else (5, 6), "ab") for request in requests(tiny_trait(), samples=1)
    ]


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_without_a_judge_all_count_but_the_empty():
    kept, counts = keep(some(empty={"negative/1/0/0"}), None, 50)
    assert len(kept) == 11
    assert counts == {"positive": {"kept": 6}, "negative": {"kept": 5, "empty": 1}}


def test_a_judge_keeps_what_shows_what_was_asked_for():
    scores = {
        "positive/0/0/0": 50,
        "positive/0/1/0": 50.5,
        "negative/0/0/0": 50,
        "negative/0/1/0": 49,
        "positive/1/0/0": None,
    }
    kept, counts = keep(some(), lambda r: scores.get(r.request.id, 0), 50)
    assert {r.request.id for r in kept if r.request.side == "positive"} == {"positive/0/1/0"}
    assert "negative/0/0/0" not in {r.request.id for r in kept}
    assert counts == {
        "positive": {"kept": 1, "unscored": 1, "filtered": 4},
        "negative": {"kept": 5, "filtered": 1},
    }
    strict, _ = keep(some(), lambda r: 80 if r.request.side == "positive" else 20, 79)
    assert len(strict) == 12


def test_a_side_without_responses():
    with pytest.raises(DataError, match=r"no positive response is left to average \(6 filtered\)"):
        keep(some(), lambda _: 10, 50)


@pytest.mark.parametrize("score", [math.nan, math.inf, "high"])
def test_a_judge_must_give_numbers(score):
    with pytest.raises(SettingsError, match=r"the judge gave .* for positive/0/0/0"):
        keep(some(), lambda _: score, 50)


def test_stored_scores(tmp_path):
    rows = [{"id": r.request.id, "score": 90 if r.request.side == "positive" else 3.5, "answer": "x"} for r in some()]
    judge = read_scores(write(tmp_path / "scores.jsonl", *rows, ""))
    assert [judge(r) for r in some()] == [row["score"] for row in rows]
    judge = read_scores(write(tmp_path / "scores.jsonl", *rows[:-1]))
    with pytest.raises(DataError, match=r"scores.jsonl: has no score for negative/1/2/0"):
        [judge(r) for r in some()]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "scores.jsonl:2: is not JSON"),
        ({"id": "a"}, "scores.jsonl:2: a row of scores has an id and a score"),
        ([1], "scores.jsonl:2: a row of scores has an id and a score"),
        ({"id": "a", "score": "7"}, "scores.jsonl:2: the score of a must be a finite number or null, not '7'"),
        ({"id": "a", "score": True}, "must be a finite number or null, not True"),
        ({"id": "b", "score": 7}, "scores.jsonl:2: b is scored twice"),
    ],
)
def test_damaged_scores(tmp_path, row, message):
    with pytest.raises(DataError) as refused:
        read_scores(write(tmp_path / "scores.jsonl", {"id": "b", "score": None}, row))
    assert message in str(refused.value)


def test_absent_scores(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl: the scores cannot be read"):
        read_scores(tmp_path / "absent.jsonl")
