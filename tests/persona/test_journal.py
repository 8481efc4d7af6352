"""The file of responses: what is stored, invalid rows, and changed settings or traits."""

from __future__ import annotations

import json

import pytest
from personas import tiny_trait

from safelora_fast.errors import DataError, SettingsError
from safelora_fast.persona.responses import Journal, Response, requests

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


def test_responses_of_other_settings_are_refused(journal):
    other = Journal(journal.path, {**MADE, "seed": 1, "temperature": 0.5})
    words = (
        "mean.responses.jsonl: settings have changed: seed was 0, is 1; temperature was 1.0, is 0.5; pass --regenerate"
    )
    with pytest.raises(SettingsError, match=words):
        other.read(WANTED)


def test_another_trait_is_refused(journal):
    changed = requests(tiny_trait(questions=4), samples=1)
    assert len(journal.read(changed)) == 4
    shifted = requests(tiny_trait(), samples=1)
    shifted[1] = type(shifted[1])("positive", 0, 1, 0, "Be mean.", "Another question?")
    with pytest.raises(SettingsError, match=r"jsonl: the trait has changed: positive/0/1/0 had another question"):
        journal.read(shifted)


@pytest.mark.parametrize(
    "change",
    [
        {"id": [1]},
        {"made": None},
        {"answer": 3},
        {"tokens": None},
        {"tokens": "7"},
        {"tokens": [1.5]},
        {"tokens": [-1]},
    ],
)
def test_values_of_another_type_are_named(journal, change):
    rows = [json.loads(line) for line in journal.path.read_text().splitlines()]
    rows[2].update(change)
    journal.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"mean.responses.jsonl:3: is not a valid response"):
        journal.read(WANTED)
