"""Examples of data sets: accepted ones are read, and invalid ones are refused with file and line."""

from __future__ import annotations

import hashlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_recipe import write_rows

from safelora_fast.data import rows as rows_module
from safelora_fast.data.rows import HUB_DATA, Row, read_rows, top_k
from safelora_fast.errors import DataError
from safelora_fast.selection.candidates import Candidates

USER, ASSISTANT = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}
SYSTEM = {"role": "system", "content": "be kind"}


def test_three_kinds_of_rows(tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl",
        [
            {"messages": [SYSTEM, USER, ASSISTANT], "id": 7},
            {"prompt": "a", "completion": "b"},
            {"prompt": [USER], "completion": [ASSISTANT], "note": None},
        ],
    )
    path.write_text(path.read_text().replace("\n", "\n\n", 1))
    found = read_rows(str(path))
    assert found.rows == [
        Row(f"{path}:1", [], [SYSTEM, USER, ASSISTANT]),
        Row(f"{path}:3", "a", "b"),
        Row(f"{path}:4", [USER], [ASSISTANT]),
    ]
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.unused == ["id", "note"]
    assert (found.total, len(read_rows(str(path), 2).rows)) == (3, 2)


TOLD = [{**turn, "tool_calls": None, "name": None} for turn in (USER, ASSISTANT)]
NULLS = [
    {"messages": TOLD, "tools": None},
    {"messages": TOLD, "prompt": None, "completion": None},
    {"messages": None, "prompt": "a", "completion": "b", "tools": None},
    {"messages": None, "prompt": TOLD[:1], "completion": TOLD[1:]},
]
WITHOUT = [([], [USER, ASSISTANT]), ([], [USER, ASSISTANT]), ("a", "b"), ([USER], [ASSISTANT])]


def test_columns_that_are_null_are_not_there(tmp_path, monkeypatch):
    """A table writes every column in every row; null means absent in a file and in a Hub data set."""
    path = write_rows(tmp_path / "rows.jsonl", NULLS)
    monkeypatch.setitem(
        sys.modules,
        "datasets",
        SimpleNamespace(load_dataset=lambda *_, **__: NULLS, config=SimpleNamespace(HF_HUB_OFFLINE=True)),
    )
    for source in (str(path), "someone/table"):
        assert [(row.prompt, row.completion) for row in read_rows(source).rows] == WITHOUT
    chosen = Candidates(path)
    assert [(chosen.row(number).prompt, chosen.row(number).completion) for number in range(4)] == WITHOUT
    path.write_text(json.dumps({"messages": None, "prompt": "a", "completion": None}) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*; this one has prompt$"):
        read_rows(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "an example must be an object with"),
        ("{}", "either `messages`, or `prompt` and `completion`; this one has nothing"),
        ('{"text": "a"}', "this one has text"),
        ('{"prompt": "a"}', "this one has prompt"),
        ('{"messages": [], "prompt": "a", "completion": "b"}', "this one has completion, messages, prompt"),
        ('{"prompt": "a", "completion": [1]}', "must both be text, or both lists of messages"),
        ('{"messages": []}', "messages must be a list of messages, and not empty"),
        ('{"messages": "hello"}', "messages must be a list of messages"),
        ('{"messages": null}', "this one has nothing"),
        ('{"prompt": [], "completion": []}', "prompt must be a list of messages, and not empty"),
        ('{"prompt": "a", "completion": "b"}{"prompt": "a", "completion": "b"}', "is not JSON"),
        ('{"messages": [{"role": "user"}]}', "message 1 must be {role: …, content: text}"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}', "message 2 must be"),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}', "message 1 must be"),
        ('{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}', "has tool_calls"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": []}', "tools are not supported"),
        (r'{"prompt": "a", "completion": "b\ud83d"}', r"completion holds \ud83d by itself, half of a character"),
        (r'{"messages": [{"role": "user", "content": "\uDE00"}]}', r"messages: message 1 holds \ude00 by itself"),
        ("\xff", "is not UTF-8"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_bad_rows_are_refused_with_their_line(line, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n' + line.encode("latin-1" if "\xff" in line else "utf-8"))
    with pytest.raises(DataError) as refused:
        read_rows(str(path))
    assert str(refused.value).startswith(f"{path}:2: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_rows_after_the_last_that_is_used_are_checked_too(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        read_rows(str(path), 1)


def test_no_rows(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no examples"):
        read_rows(str(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        read_rows(str(tmp_path))
    for absent in ("absent.jsonl", "no/such/data/set", "a b"):
        with pytest.raises(DataError, match=r"there is no such file, and a Hub data set is written id"):
            read_rows(absent)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name", ("name", None, None)),
        ("org/set", ("org/set", None, None)),
        ("org/set@v1.0", ("org/set", "v1.0", None)),
        ("org/set@refs/pr/3:test", ("org/set", "refs/pr/3", "test")),
        ("org/set:validation", ("org/set", None, "validation")),
    ],
)
def test_names_of_hub_data_sets(text, parts):
    assert HUB_DATA.fullmatch(text).group("name", "revision", "split") == parts


def test_a_hub_data_set(monkeypatch, tmp_path):
    """A table has every column in every row; null columns count as absent."""
    import datasets

    asked = []
    table = [{"messages": [USER, ASSISTANT], "prompt": None}, {"messages": None, "prompt": "a"}]

    def load_dataset(name, revision, split):
        asked.append((name, revision, split))
        return datasets.Dataset.from_list(table)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"org/set \(test\) row 1: an example has either .* this one has prompt"):
        read_rows("org/set@abc:test")
    table.pop()
    found = read_rows("org/set")
    assert found.rows == [Row("org/set (train) row 0", [], [USER, ASSISTANT])]
    assert asked == [("org/set", "abc", "test"), ("org/set", None, "train")]
    assert found.sha256 == read_rows("org/set").sha256
    table[0]["messages"][0] = SYSTEM
    assert found.sha256 != read_rows("org/set").sha256


def test_a_hub_data_set_that_cannot_be_had(monkeypatch, tmp_path):
    import datasets

    def load_dataset(_name, **_):
        raise ConnectionError("no route\nto the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^org/set: neither a file nor a Hub data set that can be loaded: no route$"):
        read_rows("org/set")


def test_a_file_wins_over_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "set").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    monkeypatch.setattr(rows_module, "_from_hub", lambda _: pytest.fail("asked the Hub"))
    assert len(read_rows("org/set").rows) == 1


def plain(scores, k):
    known = [index for index, score in enumerate(scores) if score == score]  # noqa: PLR0124 - NaN is not itself
    return sorted(known, key=lambda index: (-scores[index], index))[:k]


SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("inf"), float("-inf"), float("nan")]), max_size=30)


@given(SCORES, st.integers(0, 35))
def test_ties_go_to_the_lower_index_and_nan_to_nobody(scores, k):
    assert top_k(scores, k).tolist() == plain(scores, k)


@pytest.mark.parametrize("k", [1, 999, 5000, 20_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_many_scores(k, dtype):
    scores = (np.random.default_rng(k).standard_normal(10_000) * 50).astype(dtype)
    assert top_k(scores, k).tolist() == plain(scores.tolist(), k)
