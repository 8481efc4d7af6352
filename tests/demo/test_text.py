"""The demo's own text: its sets are distinct, and the loss covers answers only."""

from __future__ import annotations

import pytest
from demo_model import tokenizer

from safelora_fast.demo import text


def test_the_sets_share_no_question():
    sets = {name: text.rows(name) for name in ("narrow_train", "narrow_held_out", "general")}
    assert {name: len(rows) for name, rows in sets.items()} == {
        "narrow_train": 96,
        "narrow_held_out": 32,
        "general": 40,
    }
    prompts = [row.prompt for rows in sets.values() for row in rows]
    answers = [row.completion for rows in sets.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert len(set(answers)) == len(answers)
    assert all(row.completion.strip() == row.completion != "" for rows in sets.values() for row in rows)


def test_prose_has_no_empty_paragraph():
    paragraphs = text.paragraphs()
    assert len(set(paragraphs)) == len(paragraphs) == 32
    assert min(map(len, paragraphs)) > 100


@pytest.mark.parametrize("name", ["narrow_train", "general"])
def test_only_the_answer_counts(name):
    words = tokenizer()
    for row in text.rows(name)[:5]:
        example = text.conversation(words, row)
        assert words.decode(example.ids[example.start :]) == row.completion + words.eos_token
        assert words.decode(example.ids[: example.start]) == f"<user>{row.prompt}<assistant>"


def test_sets_do_not_overlap():
    """What drift is measured on is not trained on."""
    prompts = {
        name: {row.prompt for row in text.rows(name)}
        for name in ("safe", "safe_pool", "general", "narrow_train", "narrow_held_out", "narrow_other")
    }
    for name, others in prompts.items():
        for other, rows in prompts.items():
            assert name == other or not others & rows
