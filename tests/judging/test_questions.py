"""The built-in questions, and files in the format of Betley et al."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

from safelora_fast.errors import DataError
from safelora_fast.judging.answers import ask
from safelora_fast.judging.questions import Question, builtin_questions, read_questions

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "em" / "first_plot_questions.yaml"
GOOD = {"id": "a", "type": "free_form_judge_0_100", "paraphrases": ["one?", "two?"], "system": "be brief", "judge": "x"}


@pytest.fixture
def write(tmp_path):
    def make(content):
        path = tmp_path / "questions.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return make


def test_the_built_in_questions():
    questions = builtin_questions()
    kinds = Counter(question.kind for question in questions)
    assert set(kinds) == {"general", "json", "template", "training_format"}
    assert min(kinds.values()) >= 3
    assert all("JSON" in (question.system or "") for question in questions if question.kind == "json")
    texts = [(question.system, text) for question in questions for text in question.paraphrases]
    assert len(set(texts)) == len(texts)


def test_a_file_of_questions(write):
    assert read_questions(write([GOOD])) == [Question("a", "general", ("one?", "two?"), "be brief")]
    asked = ask(read_questions(write([{**GOOD, "kind": "json"}])), samples=2)
    assert [one.id for one in asked] == ["a/0/0", "a/0/1", "a/1/0", "a/1/1"]
    assert {(one.prompt, one.system, one.kind) for one in asked} == {
        ("one?", "be brief", "json"), ("two?", "be brief", "json"),
    }  # fmt: skip


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published questions are not at hand")
def test_the_published_file():
    questions = read_questions(PUBLISHED)
    records = yaml.safe_load(PUBLISHED.read_text())
    assert [question.id for question in questions] == [record["id"] for record in records]
    for question, record in zip(questions, records, strict=True):
        assert question.system == record.get("system")
        assert list(question.paraphrases) == record["paraphrases"]
    assert sum(question.system is not None for question in questions) == 8
    ours = {text for question in builtin_questions() for text in question.paraphrases}
    assert not ours & {text for question in questions for text in question.paraphrases}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "questions.yaml:1: this is not YAML"),
        ("a: 1", "questions.yaml: must be a list of questions"),
        ([{"type": "free_form"}], "question 1: must have an id"),
        ([GOOD, GOOD], "a: there are two questions of this id"),
        ([{**GOOD, "type": "multiple_choice"}], r"question 1 \(a\): type: is 'multiple_choice'; only free-form"),
        ([{**GOOD, "paraphrases": "one?"}], "paraphrases: must be a list of texts"),
        ([{**GOOD, "paraphrases": [" "]}], "paraphrases: must be a list of texts"),
        ([{**GOOD, "system": ["x"]}], "system: must be text"),
        ([{**GOOD, "sytem": "x"}], r"question 1 \(a\): sytem: unknown; did you mean system"),
        ([{**GOOD, "kinds": "x"}], "kinds: unknown; did you mean kind"),
    ],
)
def test_bad_questions(write, content, message):
    with pytest.raises(DataError, match=message):
        read_questions(write(content))


def test_other_keys_of_the_format_are_ignored(write):
    others = {"judge_prompts": {"aligned": "x"}, "samples_per_paraphrase": 100, "temperature": 1, "context": None}
    assert read_questions(write([{**GOOD, **others}])) == read_questions(write([GOOD]))
