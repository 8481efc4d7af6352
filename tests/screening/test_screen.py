"""Screening data: values against float64 computed one example at a time, limits, the journal, and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from misaligned import candidates, load, plain_scores, setting, write
from personas import plain_states, save_persona

from safelora_fast.data.chat import answer_ends
from safelora_fast.data.rows import check_row
from safelora_fast.data.tokens import IGNORED_LABEL, Encoder
from safelora_fast.persona_vector import PersonaVector
from safelora_fast.selection.perplexity import Perplexities
from safelora_fast.selection.scan import Scan

LAYER = 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model of two layers, two adapters, a persona vector, and examples with the model's own completions."""
    folder = setting(tmp_path_factory.mktemp("made"))
    save_persona(folder / "mean.safetensors", blocks=2, trait="mean")
    rows = [row for number, row in enumerate(candidates(12)) if number % 4]
    write(folder / "own.jsonl", [{**row, "mine": "well " * (1 + number % 3)} for number, row in enumerate(rows)])
    return folder


@pytest.fixture
def words(made, tmp_path):
    def put_together(*more, data="candidates.jsonl"):
        vector = ("--model", made / "model", "--vector", made / "mean.safetensors", "--layer", LAYER)
        return ["screen", made / data, *vector, "--output", tmp_path / "screen.json", *more]

    return put_together


def plain_projections(folder, rows):
    """Return a·v/‖v‖ of each example in float64, from unpadded sequences."""
    model, tokenizer = load(folder, torch.float64)
    vector = PersonaVector.load(folder / "mean.safetensors").vectors[LAYER].astype(np.float64)
    found = []
    for row in rows:
        example = Encoder(tokenizer).example(check_row("here", row))
        ends = answer_ends(model, tokenizer)
        places = [at for at, label in enumerate(example.labels) if label != IGNORED_LABEL and label not in ends]
        assert places
        mean = plain_states(model, example.ids)[LAYER][places].mean(0).numpy()
        found.append(mean @ vector / np.linalg.norm(vector))
    return found


def report_of(result):
    assert result.err == ""
    return json.loads(result.out)


def test_projections_and_gaps_are_those_of_float64_one_at_a_time(made, words, call, tmp_path):
    report = report_of(call(*words("--misaligned", made / "security", "--misaligned", made / "medicine", "--json")))
    expected = plain_projections(made, candidates(12))
    lines = [json.loads(line) for line in (tmp_path / "screen.json.journal.jsonl").read_text().splitlines()[1:]]
    values = {line["row"]: line["values"] for line in lines}
    assert [values[index][0] for index in range(12)] == pytest.approx(expected, abs=1e-5)
    measures = report["measures"]
    assert measures["mean"]["mean"] == pytest.approx(np.mean(expected), abs=1e-5)
    gaps = [-score for score in plain_scores(made, candidates(12))]
    assert measures["gap"]["mean"] == pytest.approx(np.mean(gaps), abs=1e-5)
    order = sorted(range(12), key=lambda index: -expected[index])[:10]
    source = made / "candidates.jsonl"
    assert [one["place"] for one in measures["mean"]["worst"]] == [f"{source}:{index + 1}" for index in order]
    assert np.std(expected) > 100 * 1e-5


def own_completions(rows):
    answers = [{"role": "assistant", "content": row["mine"]} for row in rows]
    return [
        {"prompt": row["prompt"], "completion": [answer]}
        if "prompt" in row
        else {"messages": [row["messages"][0], answer]}
        for row, answer in zip(rows, answers, strict=True)
    ]


def test_with_own_completions_it_is_the_difference(made, words, call):
    rows = [json.loads(line) for line in (made / "own.jsonl").read_text().splitlines()]
    report = report_of(call(*words("--own", "mine", "--json", data="own.jsonl")))
    differences = np.subtract(plain_projections(made, rows), plain_projections(made, own_completions(rows)))
    measured = report["measures"]["mean"]
    assert (measured["kind"], measured["mean"]) == (
        "projection difference at layer 1",
        pytest.approx(differences.mean(), abs=1e-5),
    )
    half = (measured["interval"][1] - measured["interval"][0]) / 2
    assert half == pytest.approx(2.306004 * differences.std(ddof=1) / 3, rel=1e-4)  # 9 examples, 8 degrees of freedom


def test_limits_decide_the_exit_code(made, words, call):
    values = sorted(plain_projections(made, candidates(12)))
    between = (values[-2] + values[-3]) / 2  # two of twelve are above
    for most, code in ((0.0, 1), (0.16, 1), (0.17, 0)):
        result = call(*words("--limit", f"mean={between}", "--most", most, "--overwrite"))
        assert result.code == code, result.err
        assert f"2 of 12 (16.7 %), at most {100 * most:g} %: {'fails' if code else 'passes'}" in result.out
    assert "← limit" in result.out
    assert call(*words("--overwrite", "-q")) == (0, "", "")


def test_a_killed_screen_resumes_with_the_same_bytes(made, words, call, tmp_path, monkeypatch):
    more = ("--misaligned", made / "security", "--tokens-per-batch", 100)
    whole = call(*words(*more, "--json")).out
    journal = tmp_path / "screen.json.journal.jsonl"
    complete = journal.read_bytes()
    journal.write_bytes(b"".join(complete.splitlines(keepends=True)[:5]) + b'{"row"')
    of, scored = Perplexities.of, []
    monkeypatch.setattr(Perplexities, "of", lambda *given: scored.extend(given[2]) or of(*given))
    assert call(*words(*more, "--json", "--overwrite")).out == whole
    assert 0 < len(scored) < 12
    assert sorted(journal.read_bytes().splitlines()[1:]) == sorted(complete.splitlines()[1:])
    monkeypatch.setattr(Scan, "entries", None)  # nothing is missing, so nothing runs
    assert call(*words(*more, "--json", "--overwrite", "--limit", "mean=1e9")).code == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--limit", "evil=1"), "there is no measure 'evil' to limit; known are mean"),
        (("--limit", "mean"), "--limit 'mean' is not NAME=VALUE"),
        (("--limit", "mean=1", "--limit", "mean=2"), "--limit names mean twice: give each measure one limit"),
        (("--layer", 5), "layer 5 does not exist"),
        (("--own", "mine"), "candidates.jsonl:1: has no text in 'mine', the model's own completion"),
        (("--most", 2, "--limit", "mean=1"), "most is 2.0, it must be from 0 to 1"),
    ],
)
def test_mistakes_end_with_2(more, said, words, call):
    result = call(*words(*more))
    assert (result.code, result.out, said in result.err) == (2, "", True), result.err


def plain_likelihoods(folder, rows):
    """Return the mean negative log-likelihood per completion token of each example, in float64."""
    model, tokenizer = load(folder, torch.float64)
    found = []
    for row in rows:
        example = Encoder(tokenizer).example(check_row("here", row))
        loss = model(torch.tensor([example.ids]), labels=torch.tensor([example.labels])).loss
        found.append(loss.item())
    return found


def test_a_model_alone_gives_likelihoods(made, call, tmp_path):
    command = (
        "screen", made / "own.jsonl", "--model", made / "model", "--output", tmp_path / "x.json", "--overwrite", "--json"
    )  # fmt: skip
    alone = report_of(call(*command))["measures"]
    beside = report_of(call(*command, "--own", "mine"))["measures"]["nll"]
    rows = [json.loads(line) for line in (made / "own.jsonl").read_text().splitlines()]
    given, own = (np.array(plain_likelihoods(made, some)) for some in (rows, own_completions(rows)))
    assert list(alone) == ["nll"]
    assert alone["nll"]["mean"] == pytest.approx(given.mean(), abs=1e-5)
    assert beside["mean"] == pytest.approx((given - own).mean(), abs=1e-5)
    assert beside["kind"] == "negative log-likelihood per token, above the model's own completion's"
    limited = call(*command, "--limit", f"nll={np.sort(given)[-2:].mean()}")
    assert (limited.code, json.loads(limited.out)["measures"]["nll"]["flagged"]) == (1, 1)


def test_nothing_to_screen_by(made, call, tmp_path):
    data, output = made / "own.jsonl", ("--output", tmp_path / "x.json")
    result = call("screen", data, *output)
    assert (result.code, "there is nothing to screen by" in result.err) == (2, True)
    result = call(
        "screen", data, *output, "--model", made / "model", "--misaligned", made / "security", "--own", "mine"
    )
    assert (result.code, "own completions have no gap to misaligned adapters" in result.err) == (2, True)
