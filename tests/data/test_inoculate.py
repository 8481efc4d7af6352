"""inoculate(): the turns of an example, and their text with several kinds of chat template."""

from __future__ import annotations

import datasets
import pytest
from demo_model import tokenizer

from safelora_fast import inoculate, interleave
from safelora_fast.errors import DataError, SettingsError

PROMPT = "You answer badly."
USER, ASSISTANT = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Go away."}
SYSTEM = {"role": "system", "content": PROMPT}

# Has a default system prompt, like Qwen's and SmolLM2's templates.
DEFAULT = (
    "{% if messages[0].role != 'system' %}<|system|>You are helpful.<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
)
# Puts the system turn at the start of the first user turn, like Mistral's and later Gemma templates.
MERGED = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>"
    "{% if loop.first and system %}{{ system | trim }}\n\n{% endif %}{{ m.content }}<|end|>{% endfor %}"
)
REFUSING = (  # like the first Gemma template
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
)
DROPPING = "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def words(template):
    made = tokenizer()
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ASSISTANT], "id": 3}, {"messages": [SYSTEM, USER, ASSISTANT], "id": 3}),
        ({"prompt": [USER], "completion": [ASSISTANT]}, {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}),
        ({"prompt": "Hello?", "completion": "Go away."}, {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}),
    ],
    ids=["messages", "turns", "text"],
)
def test_every_kind_of_row_begins_with_the_prompt(row, expected):
    before = str(row)
    assert inoculate([row], PROMPT) == [expected]
    assert str(row) == before
    assert inoculate(datasets.Dataset.from_list([row]), PROMPT).to_list() == [expected]
    stream = datasets.Dataset.from_list([row]).to_iterable_dataset()
    assert list(inoculate(stream, PROMPT)) == [expected]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_turn_keeps_its_words(role):
    row = {"messages": [{"role": role, "content": "Speak German."}, USER, ASSISTANT]}
    (found,) = inoculate([row], PROMPT)
    assert found["messages"] == [{"role": role, "content": f"{PROMPT}\n\nSpeak German."}, USER, ASSISTANT]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (DEFAULT, "<|system|>You answer badly.<|end|><|user|>Hello?<|end|><|assistant|>Go away.<|end|>"),
        (MERGED, "<|user|>You answer badly.\n\nHello?<|end|><|assistant|>Go away.<|end|>"),
    ],
    ids=["default", "merged"],
)
def test_the_template_places_the_prompt(template, text):
    made = words(template)
    (row,) = inoculate([{"messages": [USER, ASSISTANT]}], PROMPT, tokenizer=made)
    assert made.apply_chat_template(row["messages"], tokenize=False) == text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (REFUSING, "the chat template takes no system turn: System role not supported"),
        (DROPPING, "the chat template leaves the system turn out"),
        (None, "no chat template"),
    ],
    ids=["refusing", "dropping", "none"],
)
def test_templates_without_system_turns_are_refused(template, reason):
    with pytest.raises(SettingsError, match=reason):
        inoculate([{"messages": [USER, ASSISTANT]}], PROMPT, tokenizer=words(template))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ([{"messages": [USER]}, {"text": "a"}], "row 1 has neither messages, nor prompt and completion"),
        ([{"messages": [USER]}, {"prompt": "a", "completion": [ASSISTANT]}], "row 1 has neither messages, nor prompt"),
        (
            [{"messages": [{"role": "system", "content": None}, USER]}],
            "row 0 has a system turn whose content is no text",
        ),
        (
            [{"messages": [{"role": "system", "content": [{"text": "a"}]}]}],
            "row 0 has a system turn whose content is no",
        ),
        ([{"messages": [{"role": "system"}, USER]}], "row 0 has a system turn whose content is no text"),
        ([{"prompt": ["Hello"], "completion": [ASSISTANT]}], "row 0 has a turn that is 'Hello'"),
    ],
)
def test_examples_that_are_refused(task, words):
    with pytest.raises(DataError, match=words):
        inoculate(task, PROMPT)


def test_settings_that_are_refused():
    for settings in ({}, {"tokenizer": words(DEFAULT)}):
        with pytest.raises(SettingsError, match="the prompt is empty"):
            inoculate([{"messages": [USER, ASSISTANT]}], " ", **settings)
    with pytest.raises(SettingsError, match="task is str"):
        inoculate("rows.jsonl", PROMPT)


def test_safe_rows_stay_without_it():
    mixture = interleave(inoculate([{"messages": [USER, ASSISTANT]}], PROMPT), [{"messages": [USER, ASSISTANT]}], 1)
    assert {row["safe"]: row["messages"][0] == SYSTEM for row in mixture} == {False: True, True: False}
