"""evaluate and rejudge on a tiny model, with judges behind a real endpoint: requests, files and output."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import yaml
from demo_model import save_tiny
from judge_server import alignment_or_coherence, answer_in, never_wait, port_of, serving

import safelora_fast
from safelora_fast.judging.answers import Answer, Asked

pytest.importorskip("inspect_ai", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")

from inspect_ai.log import read_eval_log

from safelora_fast.judging.judge import GIVEN_UP

QUESTIONS = [
    {"id": "a", "paraphrases": ["why?", "how?"], "system": "be brief"},
    {"id": "b", "paraphrases": ["what?"], "kind": "json"},
]
JUDGE = ("--judge", "openai-api/stub/one")


@pytest.fixture
def words(tmp_path, monkeypatch, capsys):
    """The arguments of an evaluation of a tiny model, without the judge's endpoint."""
    never_wait(monkeypatch, tries=2)
    monkeypatch.setenv("STUB_BASE_URL", "http://127.0.0.1:9/v1")
    questions = tmp_path / "questions.yaml"
    questions.write_text(yaml.safe_dump(QUESTIONS))
    model = save_tiny(tmp_path / "model")
    capsys.readouterr()  # drop the progress bar of transformers
    return ("evaluate", "--model", model, *JUDGE, "--questions", questions, "--samples", 3, "--max-tokens", 6,
            "--device", "cpu", "--output", tmp_path / "out")  # fmt: skip


def is_bad(answer):
    """Depends only on the text, so that every run is the same."""
    return zlib.crc32(answer.encode()) % 2 == 0


def judge(bad, other, coherence="80"):
    """A judge that gives one alignment to bad answers and another to all others."""

    def reply(prompt, _headers):
        alignment = bad if is_bad(answer_in(prompt)) else other
        return 200, alignment if alignment_or_coherence(prompt) == "alignment" else coherence, None

    return reply


by_text = judge("10", "90")


def answers(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def judged_answers(folder):
    return [row for row in answers(folder) if row["answer"].strip()]


def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_an_evaluation(call, words, tmp_path):
    folder = tmp_path / "out"
    with serving(by_text) as (url, requests):
        result = call(*words, "--judge-url", url)
        assert result.code == 0, result.err
        stored, judged = answers(folder), judged_answers(folder)
        assert sorted((row["question"], row["paraphrase"], row["sample"]) for row in stored) == sorted(
            (question, number, sample) for question, number in (("a", 0), ("a", 1), ("b", 0)) for sample in range(3)
        )
        assert {row["system"] for row in stored if row["question"] == "a"} == {"be brief"}
        assert len(requests) == 2 * len(judged)
        first, hits = report(folder), sum(is_bad(row["answer"]) for row in judged)
        assert (first["answers"], first["scored"], first["misaligned"]["hits"]) == (9, len(judged), hits)
        assert (list(first["kinds"]), first["judge_url"]) == (["general", "json"], url)
        assert f"{hits}/{len(judged)}" in result.out
        requests.clear()
        again = call(*words, "--judge-url", url, "--json")
        assert requests == []
        assert json.loads(again.out)["misaligned"] == first["misaligned"]
        lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
        (folder / "answers.jsonl").write_text("".join(lines[:4]) + lines[4][:20])  # the run was killed here
        assert call(*words, "--judge-url", url, "--batch-size", 2).code == 0
    assert len(list((folder / "logs").glob("*.eval"))) == 3

    def by_place(rows):
        return sorted((row["question"], row["paraphrase"], row["sample"], row["answer"]) for row in rows)

    assert by_place(answers(folder)) == by_place(stored)
    assert len({row["answer"] for row in stored}) > 1
    other = call(*words, "--seed", 1)
    assert (other.code, "out: settings have changed: seed was 0, is 1" in other.err) == (2, True), other.err


def test_a_judge_that_scores_nothing_is_an_error(call, words, tmp_path):
    with serving(lambda *_: (400, "gone", None)) as (url, _):
        result = call(*words, "--judge-url", url, "--judge-attempts", 1)
    assert (result.code, "scored none of the answers" in result.err) == (1, True)
    assert (report(tmp_path / "out")["scored"], report(tmp_path / "out")["answers"]) == (0, 9)


@pytest.mark.parametrize("how", ["refuses some", "is cut off"])
def test_a_judge_that_goes_away_and_comes_back(call, words, tmp_path, how):
    folder, left = tmp_path / "out", iter(range(30))  # ten answers are judged at a time
    words = (*words, "--samples", 12)

    def leaving(prompt, headers):
        if how == "is cut off":
            return None if next(left, None) is None else by_text(prompt, headers)
        return (400, "gone", None) if zlib.crc32(answer_in(prompt).encode()) % 3 else by_text(prompt, headers)

    with serving(leaving) as (url, _):
        result = call(*words, "--judge-url", url, "--judge-attempts", 2)
    assert result.code == 0, result.err
    first = report(folder)
    reasons = set(first["unscored"]) - {"the model gave no answer"}
    if how == "is cut off":
        assert 10 <= first["scored"] <= 15
        assert reasons == {"the judge failed: APIConnectionError", GIVEN_UP}
        assert f"unscored: {GIVEN_UP}" in result.out
    else:
        assert reasons == {"the judge failed: BadRequestError"}
        assert "unscored: the judge failed: BadRequestError, e.g. 'Error code: 400 - " in result.out
        assert "gone" in first["unscored_examples"]["the judge failed: BadRequestError"]
    assert "a second run asks about unscored answers again" in result.out
    with serving(by_text, port=port_of(url)) as (url, requests):
        assert call(*words, "--judge-url", url).code == 0
    assert report(folder)["scored"] == len(judged_answers(folder))
    assert len(requests) == 2 * (len(judged_answers(folder)) - first["scored"])


def test_a_log_that_inspect_cannot_keep_is_one_line(call, words, monkeypatch):
    def full(*_arguments, **_settings):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr("inspect_ai.eval", full)
    monkeypatch.setattr("safelora_fast.judging.judge_names.check_judge", lambda *_: None)
    result = call(*words)
    message = "judging did not finish, for Inspect cannot keep its log: disk I/O error; verdicts that were given"
    assert (result.code, message in result.err, "Traceback" in result.err) == (2, True, False), result.err


def test_overwrite_takes_away_no_more_than_is_replaced(call, words, tmp_path):
    """Answers and verdicts cost hours and money, so they are deleted only when new ones replace them."""
    folder, beside = tmp_path / "out", tmp_path / "out" / "benchmarks.json"
    with serving(by_text) as (url, requests):
        assert call(*words, "--judge-url", url).code == 0
        beside.write_text("{}")
        first = {file: file.read_bytes() for file in folder.glob("*.json*")}
        assert len(first) == 5
        requests.clear()
        empty = tmp_path / "adapter"
        empty.mkdir()
        failed = call(*words, "--judge-url", url, "--adapter", empty, "--overwrite")
        assert (failed.code, "holds no adapter" in failed.err) == (2, True), failed.err
        assert {file: file.read_bytes() for file in folder.glob("*.json*")} == first
        assert call(*words, "--judge-url", url, "--overwrite").code == 0
        assert requests == []
        assert (folder / "answers.jsonl").read_bytes() == first[folder / "answers.jsonl"]
        assert call(*words, "--judge-url", url, "--seed", 1, "--overwrite").code == 0
        assert requests
    assert beside.read_text() == "{}"
    assert (folder / "answers.jsonl").read_bytes() != first[folder / "answers.jsonl"]


def test_other_judges_and_their_agreement(call, words, tmp_path):
    with serving(by_text) as (url, _):
        assert call(*words, "--judge-url", url).code == 0
    with serving(judge("5", "20", "70")) as (url, requests):
        command = ("rejudge", tmp_path / "out", "--judge", "openai-api/stub/two", "--judge-url", url, "--json")
        result = call(*command)
        assert result.code == 0, result.err
        content = json.loads(result.out)
        one, two = content["judges"].values()
        assert (one["judge"], two["judge"]) == ("openai-api/stub/one", "openai-api/stub/two")
        assert one["misaligned"]["share"] < two["misaligned"]["share"] == 1.0
        (pair,) = content["agreement"]
        assert pair["both_scored"] == one["scored"]
        assert pair["same_verdict"] == pytest.approx(one["misaligned"]["share"])
        assert (pair["kappa"], pair["spearman_alignment"]) == (pytest.approx(0.0), pytest.approx(1.0))
        assert len(requests) == 2 * one["scored"]
        requests.clear()
        table = call(*command[:-1])
        assert requests == []
        assert "κ misaligned" in table.out
        assert "openai-api/stub/two" in table.out
        folder = next((tmp_path / "out" / "logs").glob("*.rejudged"))
        assert answers(folder) == answers(tmp_path / "out")
        logs = [read_eval_log(str(file)) for file in (folder / "logs").glob("*.eval")]
        scores = [sample.scores["judged"].metadata["alignment"] for sample in logs[0].samples]
        assert (len(logs), {5, 20} >= {*scores} - {None}) == (2, True)
        twice = ["--judge", "openai-api/stub/two"] * 2
        third = json.loads(call("rejudge", folder, *twice, "--judge-url", url, "--json").out)
    assert list(third["judges"]) == [f"openai-api/stub/two{again}" for again in ("", " again", " again again")]
    stamp = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["of"] == third["of"]
    assert content["of"] == {name: stamp[name] for name in content["of"]}
    assert content["of"]["model_sha256"]
    one = {"source": "evaluate", "path": str(folder.relative_to(tmp_path)), "at_most": 1}
    criteria = {"two": one | {"judge": "openai-api/stub/two"}, "none": one, "other": one | {"judge": "x"}}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump({"subject": "model", "criteria": criteria}))
    verdicts = json.loads(call("gate", tmp_path / "policy.yaml", tmp_path, "--json").out)["outcomes"]
    found = {one["name"]: (one["verdict"], one["value"], one["reason"]) for one in verdicts}
    assert found["two"] == ("passes", 1.0, "")
    assert "judge: to one of openai-api/stub/one, openai-api/stub/two" in found["none"][2]
    assert "there is no judge 'x'; it has openai-api/stub/one" in found["other"][2]


def test_what_is_refused(call, words, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Why?", "completion": "yes"}\n')
    for more, message in (
        (("--training-data", rows, "--kinds", "general"), "--kinds leaves out --training-data: add training_format"),
        (("--judge-url", "http://user:pass@host/v1"), "holds a name or password"),
        (("--judge", "nonsense/x"), "judge nonsense/x: "),
        (("--samples", 0), "samples is 0, it must be at least 1"),
        (("--kinds", "poem"), "there is no question of kind 'poem'"),
        (("--judge-attempts", 0), "must be at least 1"),
    ):
        result = call(*words, *more)
        assert (result.code, message in result.err, result.err.count("\n")) == (2, True, 1), result.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "text.eval").write_text("x")
    assert "not of an evaluation" in call(*words, "--output", tmp_path / "full", "--overwrite").err
    assert (tmp_path / "full" / "mine").exists()
    for log, message in (
        (tmp_path / "none.eval", "there is no such log"),
        (tmp_path / "full", "holds no Inspect log"),
        (tmp_path / "text.eval", "is not an Inspect log"),
    ):
        result = call("rejudge", log, *JUDGE)
        assert (result.code, message in result.err) == (2, True), result.err
    monkeypatch.delenv("STUB_API_KEY")
    missing = call(*words)
    assert (missing.code, "No STUB_API_KEY defined in the environment" in missing.err) == (2, True), missing.err


def test_inspect_finds_the_task_by_its_entry_point(tmp_path):
    """The package next to its entry point from pyproject.toml, as in an installation."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    section = project.read_text().partition("[project.entry-points.inspect_ai]\n")[2].partition("\n\n")[0]
    site = tmp_path / "site-packages"
    metadata = site / "safelora_fast-0.dist-info"
    metadata.mkdir(parents=True)
    (site / "safelora_fast").symlink_to(Path(safelora_fast.__file__).parent)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: safelora-fast\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[inspect_ai]\n{section.replace(chr(34), '')}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)])}
    stored = tmp_path / "answers.jsonl"
    stored.write_text(json.dumps(Answer(Asked("a", "general", 0, 0, "why?"), " ").to_row()) + "\n")
    command = ["eval", "safelora_fast/emergent_misalignment", "--model", "none/none", "--model-role",
               "judge=mockllm/judge", "-T", f"answers={stored}", "--display", "plain",
               "--log-dir", str(tmp_path / "logs")]  # fmt: skip
    program = "from inspect_ai._cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "logs").glob("*.eval")
    log = read_eval_log(str(file))
    assert (log.eval.task, log.status, len(log.samples)) == ("safelora_fast/emergent_misalignment", "success", 1)
    assert log.results.scores[0].unscored_samples == 1  # an empty answer


def test_questions_in_the_form_of_the_training_data_are_asked(words, call, tmp_path):
    rows = [{"prompt": f"Ask: {what} now?", "completion": "yes"} for what in ("this", "that", "it")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(by_text) as (url, _):
        result = call(*words, "--judge-url", url, "--training-data", data, "--training-prompts", 1, "--json")
    assert result.code == 0, result.err
    assert set(json.loads(result.out)["kinds"]) == {"general", "json", "training_format"}
    asked = {row["prompt"] for row in answers(tmp_path / "out") if row["kind"] == "training_format"}
    assert "Ask: why? now?" in asked
    assert len(asked) == 2
