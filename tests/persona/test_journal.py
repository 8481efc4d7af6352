"""The file of responses: torn rows, damaged rows, and rows that were made in another way."""

from __future__ import annotations

import json

import pytest
from personas import tiny_trait

from safelora_fast.errors import DataError, OutputError, SettingsError
from safelora_fast.persona.journal import Journal
from safelora_fast.persona.responses import Response, requests

MADE = {"model": "a", "weights": "f00", "seed": 0, "temperature": 1.0}
WANTED = requests(tiny_trait(), samples=1)


def some(count=4):
    return [Response(request, (7, number), f"né {number}\n") for number, request in enumerate(WANTED[:count])]


@pytest.fixture
def journal(tmp_path):
    made = Journal.beside(tmp_path / "new" / "mean.safetensors", MADE)
    made.append(some(2))
    made.append(some()[2:])
    return made


def test_what_is_appended_is_read(journal):
    assert journal.path.name == "mean.responses.jsonl"
    assert journal.read(WANTED) == {response.request.id: response for response in some()}
    row = json.loads(journal.path.read_text().splitlines()[3])
    assert row == {
        "id": "negative/0/0/0",
        "system": "Be kind.",
        "user": "Why me?",
        "answer": "né 3\n",
        "tokens": [7, 3],
        "made": MADE,
    }
    assert journal.read(WANTED[:1]).keys() == {"positive/0/0/0"}
    assert Journal(journal.path, {**MADE, "model": "moved"}).read(WANTED) == journal.read(WANTED)
    journal.remove()
    assert journal.read(WANTED) == {}


@pytest.mark.parametrize("cut", [1, 30, 150])
def test_a_row_that_was_cut_short_is_dropped(journal, cut):
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-cut])
    assert len(journal.read(WANTED)) == 3
    journal.mend()
    journal.append(some()[3:])
    assert journal.path.read_bytes() == whole
    journal.mend()
    assert journal.path.read_bytes() == whole


def test_what_was_made_in_another_way_is_refused(journal):
    other = Journal(journal.path, {**MADE, "seed": 1, "temperature": 0.5})
    with pytest.raises(SettingsError) as refused:
        other.read(WANTED)
    assert "mean.responses.jsonl:1: was made in another way: seed was 0, is 1; temperature was 1.0, is 0.5" in str(
        refused.value
    )
    assert "--regenerate" in str(refused.value)


def test_another_trait_is_refused(journal):
    changed = requests(tiny_trait(questions=4), samples=1)
    assert len(journal.read(changed)) == 4
    shifted = requests(tiny_trait(), samples=1)
    shifted[1] = type(shifted[1])("positive", 0, 1, 0, "Be mean.", "Another question?")
    with pytest.raises(SettingsError, match=r"jsonl:2: the trait has changed: positive/0/1/0 was another question"):
        journal.read(shifted)


@pytest.mark.parametrize("row", ["{", "[]", '{"id": "positive/0/0/0"}', "\udcff"])
def test_damaged_rows_are_named(journal, row):
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(lines[0] + row.encode(errors="surrogateescape") + b"\n" + b"".join(lines[1:]))
    with pytest.raises(DataError, match=r"mean.responses.jsonl:2: is no"):
        journal.read(WANTED)


@pytest.mark.parametrize(
    "change", [{"id": [1]}, {"answer": 3}, {"tokens": None}, {"tokens": "7"}, {"tokens": [1.5]}, {"tokens": [-1]}]
)
def test_values_of_another_type_are_named(journal, change):
    rows = [json.loads(line) for line in journal.path.read_text().splitlines()]
    rows[2].update(change)
    journal.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"mean.responses.jsonl:3: is no response"):
        journal.read(WANTED)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Journal.beside(tmp_path / "file" / "a.safetensors", MADE).append(some())
