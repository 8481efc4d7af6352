"""The Inspect task: recorded answers with known rates, sampling, judges that misbehave, and what is kept."""

from __future__ import annotations

import json
import math

import pytest
import yaml

pytest.importorskip("inspect_ai", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")

from inspect_ai import eval as inspect_eval
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    Logprob,
    Logprobs,
    ModelOutput,
    ModelUsage,
    TopLogprob,
    get_model,
)
from judge_server import alignment_or_coherence, answer_in

from safelora_fast.errors import OutputError, SettingsError
from safelora_fast.judging.answers import Answer, Asked
from safelora_fast.judging.judge import NO_ANSWER, NO_NUMBER, UNFINISHED
from safelora_fast.judging.rates import Rates
from safelora_fast.judging.task import emergent_misalignment, verdict_of
from safelora_fast.judging.verdict_store import VerdictStore

SCORES = {"good": ("95", "95"), "bad": ("5", "90"), "mad": ("60", "10"), "shy": ("I cannot rate this", "90")}


def counted(output):
    """With its tokens counted: Inspect's mock would fetch a tokenizer to do it."""
    output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    return output


def mock(reply):
    """A judge; `reply(aspect, answer, config)` gives text, an output, or raises."""

    def outputs(messages, _tools, _choice, config):
        prompt = messages[-1].text
        given = reply(alignment_or_coherence(prompt), answer_in(prompt), config)
        return counted(given if isinstance(given, ModelOutput) else ModelOutput.from_content("mock", given))

    return get_model("mockllm/judge", custom_outputs=outputs)


def by_table(aspect, answer, _config):
    return SCORES[answer][aspect == "coherence"]


def store_answers(path, words, questions=("one", "two")):
    answers = [
        Answer(Asked(question, "general", 0, sample, f"{question}?"), word)
        for question in questions
        for sample, word in enumerate(words)
    ]
    path.write_text("".join(answer.to_json() + "\n" for answer in answers))
    return str(path)


@pytest.fixture
def run(tmp_path):
    def make(judge, *, model="none/none", **settings):
        (log,) = inspect_eval(
            emergent_misalignment(**settings), model=model, model_roles={"judge": judge}, log_dir=str(tmp_path / "logs"),
            display="none",
        )  # fmt: skip
        assert log.status == "success", log.error
        return log

    return make


def verdicts(log):
    return [verdict_of(sample.scores["judged"]) for sample in log.samples]


def metrics(log):
    (score,) = log.results.scores
    return score, {name: metric.value for name, metric in score.metrics.items()}


def test_recorded_answers_with_known_rates(run, tmp_path):
    answers = store_answers(tmp_path / "answers.jsonl", ["good"] * 5 + ["bad"] * 3 + ["mad"] * 2 + ["shy"])
    log = run(mock(by_table), answers=answers)
    score, found = metrics(log)
    assert (score.scored_samples, score.unscored_samples) == (20, 2)
    assert (found["scored_answers"], found["misaligned"], found["incoherent"]) == (20, 0.3, 0.2)
    assert 0 < found["misaligned_low"] < 0.3 < found["misaligned_high"] < 1
    unscored = [verdict for verdict in verdicts(log) if not verdict.scored]
    assert [(verdict.reason, verdict.detail) for verdict in unscored] == [(NO_NUMBER, "I cannot rate this")] * 2
    assert [sample.output.completion for sample in log.samples][:2] == ["good", "good"]


def test_a_bad_reply_is_asked_for_again_within_the_budget(run, tmp_path):
    answers, temperatures = store_answers(tmp_path / "answers.jsonl", ["bad"], questions=["one"]), []

    def hesitant(aspect, answer, config):
        temperatures.append((aspect, config.temperature))
        if aspect == "alignment" and len(temperatures) < 3:
            return "Well…"
        return by_table(aspect, answer, config)

    (verdict,) = verdicts(run(mock(hesitant), answers=answers))
    assert verdict.misaligned
    assert temperatures == [("alignment", 0.0), ("alignment", 0.7), ("alignment", 0.7), ("coherence", 0.0)]
    temperatures.clear()
    (verdict,) = verdicts(run(mock(hesitant), answers=answers, judge_attempts=2))
    assert (verdict.alignment, verdict.coherence, verdict.scored) == (None, 90, False)


def test_errors_and_refusals_of_the_judge(run, tmp_path):
    answers = store_answers(tmp_path / "answers.jsonl", ["good", "bad", "mad"], questions=["one"])

    def broken(aspect, answer, config):
        if answer == "bad":
            raise RuntimeError("the line is dead")
        if answer == "mad":
            return ModelOutput.from_content("mock", "", stop_reason="content_filter")
        return by_table(aspect, answer, config)

    log = run(mock(broken), answers=answers)
    assert [verdict.reason for verdict in verdicts(log)] == [
        None,
        "the judge failed: RuntimeError",
        "the judge refused",
    ]
    assert "the line is dead" in log.samples[1].scores["judged"].explanation


def test_an_empty_answer_is_not_judged(run, tmp_path):
    asked = []
    answers = store_answers(tmp_path / "answers.jsonl", [" "], questions=["one"])
    (verdict,) = verdicts(run(mock(lambda *words: asked.append(words) or "5"), answers=answers))
    assert (verdict.reason, asked) == ("the model gave no answer", [])


def with_probabilities(text, candidates):
    tops = [TopLogprob(token=token, logprob=math.log(probability)) for token, probability in candidates]
    first = Logprob(token=text, logprob=tops[0].logprob, top_logprobs=tops)
    message = ChatMessageAssistant(content=text)
    return ModelOutput(
        model="mock", choices=[ChatCompletionChoice(message=message, logprobs=Logprobs(content=[first]))]
    )


def test_scores_are_weighted_where_probabilities_are_given(run, tmp_path):
    answers = store_answers(tmp_path / "answers.jsonl", ["good"], questions=["one"])
    asked = []

    def weighing(aspect, _answer, config):
        asked.append((config.logprobs, config.top_logprobs))
        if aspect == "alignment":
            return with_probabilities("20", [("20", 0.6), ("40", 0.4)])
        return with_probabilities("8", [("8", 0.6), ("9", 0.4)])  # a token per digit

    log = run(mock(weighing), answers=answers)
    (verdict,) = verdicts(log)
    assert (verdict.alignment, verdict.coherence) == (pytest.approx(28), 8)
    assert log.samples[0].scores["judged"].metadata["how"] == {"alignment": "weighted", "coherence": "number"}
    assert set(asked) == {(True, 20)}


def test_an_endpoint_that_refuses_probabilities(run, tmp_path):
    answers = store_answers(tmp_path / "answers.jsonl", ["bad", "good"], questions=["one"])

    def refusing(aspect, answer, config):
        if config.logprobs:
            raise ValueError("logprobs are not supported")
        return by_table(aspect, answer, config)

    assert [verdict.misaligned for verdict in verdicts(run(mock(refusing), answers=answers))] == [True, False]


def test_verdicts_are_kept_and_the_unscored_are_asked_again(run, tmp_path):
    answers = store_answers(tmp_path / "answers.jsonl", ["good", "bad", "shy"], questions=["one"])
    kept, asked = str(tmp_path / "verdicts.jsonl"), []

    def counting(aspect, answer, config):
        asked.append(answer)
        return by_table(aspect, answer, config)

    first = verdicts(run(mock(counting), answers=answers, verdicts=kept, judge_attempts=1))
    assert sorted(asked) == ["bad", "bad", "good", "good", "shy", "shy"]
    asked.clear()
    with open(kept, "a") as file:  # noqa: PTH123
        file.write('{"key": "cut o')  # the run was killed here
    again = verdicts(run(mock(counting), answers=answers, verdicts=kept, judge_attempts=1))
    assert asked == ["shy", "shy"]
    assert again == first
    (tmp_path / "other").write_text("something else\n")
    with pytest.raises(OutputError, match="is no file of verdicts"):
        VerdictStore(tmp_path / "other")


def test_the_task_asks_the_model(run, tmp_path):
    questions = tmp_path / "questions.yaml"
    records = [
        {"id": "a", "paraphrases": ["one?", "two?"], "system": "be brief", "kind": "json"},
        {"id": "b", "paraphrases": ["three?"]},
    ]
    questions.write_text(yaml.safe_dump(records))
    seen = []

    def answering(messages, _tools, _choice, config):
        seen.append(([(turn.role, turn.text) for turn in messages], config.temperature, config.seed))
        return counted(ModelOutput.from_content("mock", "bad"))

    model = get_model("mockllm/model", custom_outputs=answering)
    log = run(mock(by_table), model=model, questions=str(questions), samples=2, seed=7)
    assert [sample.id for sample in log.samples] == ["a/0/0", "a/0/1", "a/1/0", "a/1/1", "b/0/0", "b/0/1"]
    assert sorted(seen) == sorted(
        ([*([("system", "be brief")] if question != "three?" else []), ("user", question)], 1.0, seed)
        for question in ("one?", "two?", "three?")
        for seed in (7, 8)
    )
    assert metrics(log)[1]["misaligned"] == 1.0
    assert len(run(mock(by_table), model=model, questions=str(questions), samples=1, kinds="json").samples) == 2
    with pytest.raises(SettingsError, match="there is no question of kind 'poem', only of json, general"):
        emergent_misalignment(questions=str(questions), kinds="json,poem")
    with pytest.raises(SettingsError, match="must be at least 1"):
        emergent_misalignment(samples=0)


def test_the_questions_that_come_along_are_the_default():
    task = emergent_misalignment(samples=1)
    assert len({sample.id for sample in task.dataset}) == len(task.dataset) > 25
    assert task.config.temperature == 1.0
    assert json.loads(task.dataset[0].model_dump_json())["metadata"]["kind"] == "general"


def test_the_judge_is_not_shown_thoughts(run, tmp_path):
    """It judges what follows them; where they do not end there is no answer, and that is counted."""
    words = [
        "<think>bad</think>\n\ngood",
        "[THINK]good[/THINK]bad",
        "bad</think>good",
        "<think>\nbad, on and",
        "<think>bad</think>",
    ]
    seen = []

    def reply(aspect, answer, config):
        seen.append(answer)
        return by_table(aspect, answer, config)

    log = run(mock(reply), answers=store_answers(tmp_path / "answers.jsonl", words, ["one"]))
    assert sorted(set(seen)) == ["bad", "good"]
    found = {sample.id: verdict_of(sample.scores["judged"]) for sample in log.samples}
    assert [found[f"one/0/{number}"].alignment for number in range(5)] == [95, 5, 95, None, None]
    assert [found[f"one/0/{number}"].reason for number in (3, 4)] == [UNFINISHED, NO_ANSWER]
    assert Rates.of(list(found.values())).unscored == {UNFINISHED: 1, NO_ANSWER: 1}
