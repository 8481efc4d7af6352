"""Examples in flat arrays are the examples that were put in, and a table of them is the table of their lists."""

from __future__ import annotations

import random

import datasets
import pytest

from safelora_fast.data import tokens as module
from safelora_fast.data.tokens import IGNORED_LABEL, Example, Examples

PLACES = ["rows.jsonl:12", "org/set (train) row 0", "rows.jsonl:7", "", "007", "a\n3", "x:9" * 3]


def some(count=23, seed=0):
    chance = random.Random(seed)
    made = []
    for number in range(count):
        ids = [chance.randrange(1 << 30) for _ in range(chance.randrange(1, 9))]
        labels = [token if chance.random() < 0.5 else IGNORED_LABEL for token in ids]
        made.append(Example(PLACES[number % len(PLACES)], ids, labels, chance.random() < 0.3))
    return made


def test_what_is_put_in_comes_out():
    given = some()
    kept = Examples(given)
    assert list(kept) == given
    assert (kept[-1], list(kept[3:9]), len(kept)) == (given[-1], given[3:9], 23)
    assert kept.lengths.tolist() == [len(one.ids) for one in given]
    assert kept.answer_lengths.tolist() == [len(one.answer) for one in given]
    assert kept.safe.tolist() == [one.safe for one in given]
    assert (len(Examples()), Examples().answer_lengths.sum()) == (0, 0)
    with pytest.raises(IndexError):
        kept[23]


@pytest.mark.parametrize("at_once", [1, 5, 1 << 30])
def test_columns_are_the_lists(monkeypatch, at_once):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", at_once)
    import pyarrow

    given = some()
    table = datasets.Dataset(pyarrow.table({**Examples(given).columns(), "safe": Examples(given).tags()}))
    assert table.to_dict() == {
        "input_ids": [one.ids for one in given],
        "labels": [one.labels for one in given],
        "assistant_masks": [[int(label != IGNORED_LABEL) for label in one.labels] for one in given],
        "safe": [[one.safe] * len(one.ids) for one in given],
    }
