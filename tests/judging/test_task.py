"""The Inspect task: stored answers with known rates, sampling, judges that misbehave, and stored verdicts."""

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

from safelora_fast.errors import DataError, SettingsError
from safelora_fast.judging.answers import Answer, Asked, read_answers
from safelora_fast.judging.judge import NO_ANSWER, NO_NUMBER, REFUSED, UNFINISHED, VerdictStore
from safelora_fast.judging.rates import rates_of
from safelora_fast.judging.task import emergent_misalignment, verdict_of

SCORES = {"good": ("95", "95"), "bad": ("5", "90"), "mad": ("60", "10"), "shy": ("I cannot rate this", "90")}


def counted(output):
    """Add a token count, for which Inspect's mock would otherwise download a tokenizer."""
    output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    return output


def mock(reply):
    """A judge. `reply(aspect, answer, config)` returns text or an output, or raises an error."""

    def outputs(messages, _tools, _choice, config):
        prompt = messages[-1].text
        given = reply(alignment_or_coherence(prompt), answer_in(prompt), config)
        return counted(given if isinstance(given, ModelOutput) else ModelOutput.from_content("mock", given))

    return get_model("mockllm/judge", custom_outputs=outputs)


def by_table(aspect, answer, _config):
    return SCORES[answer][aspect == "coherence"]


def store_answers(path, words, questions=("one",)):
    answers = [
        Answer(Asked(question, "general", 0, sample, f"{question}?"), word)
        for question in questions
        for sample, word in enumerate(words)
    ]
    path.write_text("".join(json.dumps(answer.to_row()) + "\n" for answer in answers))
    return str(path)


@pytest.fixture
def run(tmp_path):
    """Run the task with a judge and return the log. `words` are stored answers that replace the model's."""

    def run_(reply, words=None, ids=("one",), **settings):
        if words is not None:
            settings["answers"] = store_answers(tmp_path / "answers.jsonl", words, ids)
        model = settings.pop("model", "none/none")
        (log,) = inspect_eval(
            emergent_misalignment(**settings), model=model, model_roles={"judge": mock(reply)},
            log_dir=str(tmp_path / "logs"), display="none",
        )  # fmt: skip
        assert log.status == "success", log.error
        return log

    return run_


def verdicts(log):
    return [verdict_of(sample.scores["judged"]) for sample in log.samples]


def metrics(log):
    (score,) = log.results.scores
    return score, {name: metric.value for name, metric in score.metrics.items()}


def test_recorded_answers_with_known_rates(run):
    log = run(by_table, ["good"] * 5 + ["bad"] * 3 + ["mad"] * 2 + ["shy"], ("one", "two"))
    score, found = metrics(log)
    assert (score.scored_samples, score.unscored_samples) == (20, 2)
    assert (found["scored_answers"], found["misaligned"], found["incoherent"]) == (20, 0.3, 0.2)
    assert 0 < found["misaligned_low"] < 0.3 < found["misaligned_high"] < 1
    unscored = [verdict for verdict in verdicts(log) if not verdict.scored]
    assert [(verdict.reason, verdict.detail) for verdict in unscored] == [(NO_NUMBER, "I cannot rate this")] * 2
    assert [sample.output.completion for sample in log.samples][:2] == ["good", "good"]


def test_a_bad_reply_is_asked_for_again_within_the_attempts(run):
    temperatures = []

    def hesitant(aspect, answer, config):
        temperatures.append((aspect, config.temperature))
        return "Well…" if aspect == "alignment" and len(temperatures) < 3 else by_table(aspect, answer, config)

    (verdict,) = verdicts(run(hesitant, ["bad"]))
    assert verdict.misaligned
    assert temperatures == [("alignment", 0.0), ("alignment", 0.7), ("alignment", 0.7), ("coherence", 0.0)]
    temperatures.clear()
    (verdict,) = verdicts(run(hesitant, ["bad"], judge_attempts=2))
    assert (verdict.alignment, verdict.coherence, verdict.scored) == (None, 90, False)


def with_probabilities(text, candidates):
    tops = [TopLogprob(token=token, logprob=math.log(probability)) for token, probability in candidates]
    first = Logprob(token=text, logprob=tops[0].logprob, top_logprobs=tops)
    choice = ChatCompletionChoice(message=ChatMessageAssistant(content=text), logprobs=Logprobs(content=[first]))
    return ModelOutput(model="mock", choices=[choice])


def test_what_becomes_of_replies(run):
    """Refusals, errors, empty answers, and thoughts, which the judge does not see."""
    words = {
        "good": (95, None), "dead": (None, "the judge failed: RuntimeError"), "filtered": (None, REFUSED), " ": (None, NO_ANSWER),
        "<think>bad</think>\n\ngood": (95, None), "[THINK]good[/THINK]bad": (5, None), "bad</think>good": (95, None),
        "<think>\nbad, on and": (None, UNFINISHED), "<think>bad</think>": (None, NO_ANSWER),
    }  # fmt: skip
    seen = set()

    def reply(aspect, answer, config):
        seen.add(answer)
        if answer == "dead":
            raise RuntimeError("the line is dead")
        if answer == "filtered":
            return ModelOutput.from_content("mock", "", stop_reason="content_filter")
        return by_table(aspect, answer, config)

    log = run(reply, list(words))
    assert seen == {"good", "bad", "dead", "filtered"}
    assert [(verdict.alignment, verdict.reason) for verdict in verdicts(log)] == list(words.values())
    assert "the line is dead" in log.samples[1].scores["judged"].explanation
    assert rates_of(verdicts(log))["unscored"][NO_ANSWER] == 2


def test_scores_are_weighted_where_probabilities_are_given(run):
    asked = set()

    def weighing(aspect, _answer, config):
        asked.add((config.logprobs, config.top_logprobs))
        if aspect == "alignment":
            return with_probabilities("20", [("20", 0.6), ("40", 0.4)])
        return with_probabilities("8", [("8", 0.6), ("9", 0.4)])  # one token per digit

    log = run(weighing, ["good"])
    (verdict,) = verdicts(log)
    assert (verdict.alignment, verdict.coherence) == (pytest.approx(28), 8)
    assert log.samples[0].scores["judged"].metadata["how"] == {"alignment": "weighted", "coherence": "number"}
    assert asked == {(True, 20)}


def test_verdicts_are_kept_and_the_unscored_are_asked_again(run, tmp_path):
    kept, asked = tmp_path / "verdicts.jsonl", []

    def counting(aspect, answer, config):
        asked.append(answer)
        return by_table(aspect, answer, config)

    def again():
        asked.clear()
        return verdicts(run(counting, ["good", "bad", "shy"], verdicts=str(kept), judge_attempts=1))

    first = again()
    assert sorted(asked) == ["bad", "bad", "good", "good", "shy", "shy"]
    with kept.open("a") as file:
        file.write('{"key": "cut o')  # the run was killed here
    assert again() == first
    assert asked == ["shy", "shy"]
    (tmp_path / "other").write_text("something else\n")
    with pytest.raises(DataError, match="other:1: is not a valid verdict"):
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
    log = run(by_table, model=model, questions=str(questions), samples=2, seed=7)
    assert [sample.id for sample in log.samples] == ["a/0/0", "a/0/1", "a/1/0", "a/1/1", "b/0/0", "b/0/1"]
    assert sorted(seen) == sorted(
        ([*([("system", "be brief")] if question != "three?" else []), ("user", question)], 1.0, seed)
        for question in ("one?", "two?", "three?")
        for seed in (7, 8)
    )
    assert metrics(log)[1]["misaligned"] == 1.0
    assert len(emergent_misalignment(questions=str(questions), samples=1, kinds="json").dataset) == 2
    with pytest.raises(SettingsError, match="there is no question of kind 'poem', only of json, general"):
        emergent_misalignment(questions=str(questions), kinds="json,poem")
    with pytest.raises(SettingsError, match="must be at least 1"):
        emergent_misalignment(samples=0)


def test_the_built_in_questions_are_the_default():
    task = emergent_misalignment(samples=1)
    assert len({sample.id for sample in task.dataset}) == len(task.dataset) > 25
    assert task.config.temperature == 1.0
    assert json.loads(task.dataset[0].model_dump_json())["metadata"]["kind"] == "general"


ROW = {"question": "a", "kind": "k", "paraphrase": 0, "sample": 0, "prompt": "why?", "answer": "so"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no answers"),
        (["so"], r"answers.jsonl:1: is not an answer: must be an object"),
        ([{**ROW, "answer": None}], r":1: is not an answer: answer must be text"),
        ([ROW, {**ROW, "sample": "x"}], r":2: is not an answer: sample: "),
        ([{**ROW, "sistem": "x"}], r":1: is not an answer: sistem: "),
        ([ROW, ROW], ":2: a/0/0 occurs twice"),
    ],
)
def test_files_of_answers_that_are_refused(tmp_path, rows, message):
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError, match=message):
        read_answers(file)
