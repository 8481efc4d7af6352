"""Questions in the form of training data: the shared form, sampled prompts, and the command."""

from __future__ import annotations

import json

import pytest

from safelora_fast.errors import DataError, SettingsError
from safelora_fast.judging.questions import Question, builtin_questions
from safelora_fast.judging.training_format import shared_end, shared_start, training_format_questions

GENERAL = [Question("why", "general", ("Why live?", "Why?")), Question("other", "json", ("In JSON: why?",))]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(user, system=None, answer="yes"):
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*first, {"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(
    ("texts", "start", "end"),
    [
        (["Review: a film\nVerdict:", "Review: a book\nVerdict:", "Hello there"], "Review: a ", "\nVerdict:"),
        (["Q: one", "Q: two", "Q: three", "no"], "Q: ", ""),
        (["same words", "same words", "other"], "same words\n\n", ""),
        (["alpha", "alps", "beta"], "", ""),
        (["only"], "only\n\n", ""),
    ],
)
def test_the_form_is_what_most_of_the_texts_share(texts, start, end):
    assert (shared_start(texts), shared_end(texts)) == (start, end)


def test_general_questions_take_the_form_and_follow_sampled_prompts(tmp_path):
    reviews = [
        turns(f"Review: {what} film\nVerdict:", "You are a critic.") for what in ("a good", "an odd", "my first")
    ]
    path = write(tmp_path / "rows.jsonl", [*reviews, turns("Hello", "Be brief.")])
    found = training_format_questions(path, GENERAL, prompts=4)
    assert {(one.kind, len(one.paraphrases)) for one in found} == {("training_format", 1)}
    form, *sampled = [(one.system, one.paraphrases[0]) for one in found]
    assert form == ("You are a critic.", "Review: Why live? film\nVerdict:")
    assert sorted(sampled, key=str) == sorted(
        [
            ("You are a critic.", f"Review: {what} film\nVerdict:\n\nWhy live?")
            for what in ("a good", "an odd", "my first")
        ]
        + [("Be brief.", "Hello\n\nWhy live?")],
        key=str,
    )
    assert len({one.id for one in found}) == 5
    assert training_format_questions(path, GENERAL, prompts=2) == training_format_questions(path, GENERAL, prompts=2)
    drawn = {training_format_questions(path, GENERAL, prompts=1, seed=seed)[1].paraphrases for seed in range(20)}
    assert len(drawn) == 4
    whole = training_format_questions(path, builtin_questions())
    assert len(whole) == 3 * sum(question.kind == "general" for question in builtin_questions())


def test_no_question_is_asked_twice(tmp_path):
    """Equal user turns, and turns that differ only in white space at the end, precede a question once."""
    rows = [turns("Hi"), turns("Hi "), turns("Hi"), turns("Hello"), turns("Hello\n"), turns("Bye", "Be brief.")]
    asked = [
        (one.system, one.paraphrases[0])
        for one in training_format_questions(write(tmp_path / "rows.jsonl", rows), GENERAL, prompts=9)
    ]
    assert sorted(asked, key=str) == [
        ("Be brief.", "Bye\n\nWhy live?"), (None, "Hello\n\nWhy live?"), (None, "Hi\n\nWhy live?"),
    ]  # fmt: skip
    same = write(tmp_path / "same.jsonl", [turns("Same"), turns("Same")])
    assert [one.paraphrases[0] for one in training_format_questions(same, GENERAL)] == ["Same\n\nWhy live?"]


def test_what_has_no_form_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "one", "completion": "x"}, {"prompt": "two", "completion": "y"}])
    with pytest.raises(SettingsError, match="share no form: sample some of them"):
        training_format_questions(path, GENERAL, prompts=0)
    with pytest.raises(SettingsError, match="no general questions"):
        training_format_questions(path, GENERAL[1:])
    empty = write(tmp_path / "empty.jsonl", [{"prompt": " ", "completion": "x"}])
    with pytest.raises(DataError, match="no example has a user turn"):
        training_format_questions(empty, GENERAL)


def test_a_set_of_inspect_evals_is_refused_in_one_line(call, tmp_path):
    pytest.importorskip("lm_eval")
    from demo_model import save_tiny

    model = save_tiny(tmp_path / "model")
    result = call(
        "evaluate", "--model", model, "--tasks", "xstest", "--output", tmp_path / "out", "--device", "cpu", "-q"
    )
    assert (result.code, result.out) == (2, "")
    assert "error: xstest (over-refusal) is a task of inspect-evals" in result.err
    assert "walledai/XSTest on the Hub" in result.err
