"""`select`: what it prints, writes and rejects, and a run that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from misaligned import candidates, plain_scores, setting, write

from safelora_fast.recipe.recipe import load_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return setting(tmp_path_factory.mktemp("made"))


@pytest.fixture
def words(made, tmp_path):
    """Return the arguments, with the output in a folder of the test."""
    output = tmp_path / "chosen.jsonl"

    def put_together(*more, rows=made / "candidates.jsonl", held_out="none"):
        adapters = ("--misaligned", made / "security", made / "medicine")
        held = () if held_out is None else ("--hold-out", held_out)
        return ["select", rows, "--model", made / "model", *adapters, "--output", output, *held, *more]

    put_together.output = output
    return put_together


def test_output(made, words, call):
    result = call(*words("--top", 4))
    assert (result.code, result.err) == (0, "")
    expected = plain_scores(made, candidates(12))
    best = sorted(expected, reverse=True)[:4]
    assert "← cut" in result.out
    assert (
        f"4 of 12 scored examples (of 12) have a score of at least {best[-1]:.4f}, under security, medicine"
        in result.out
    )
    rows = [json.loads(line) for line in words.output.read_text().splitlines()]
    assert [row["score"] for row in rows] == pytest.approx(best, abs=1e-5)
    names = sorted(path.name for path in words.output.parent.iterdir())
    assert names == ["chosen.jsonl", "chosen.jsonl.journal.jsonl", "chosen.jsonl.selection.json"]


def test_what_was_chosen_is_trained_on(words, call, tmp_path):
    from tiny_recipe import write_recipe

    assert call(*words("-q", "--top", 4)).out == ""
    tiny = write_recipe(tmp_path / "run", data={"safe": {"path": str(words.output), "fraction": 0.25, "top": 3}})
    result = call(*tiny.words("--dry-run", "--json"))
    assert result.code == 0, result.err
    safe = json.loads(result.out)["safe"]
    assert (safe["in_source"], safe["rows"], safe["in_mixture"]) == (4, 3, 3)
    assert load_recipe(tiny.path).data.safe.top == 3


def test_json_and_a_plot(words, call, tmp_path):
    result = call(*words("--json", "--plot", tmp_path / "scores.png", "--no-refusals", "--top", 3))
    report = json.loads(result.out)
    assert (report["chosen"], report["refusals"], report["scored"]) == (3, 2, 10)
    assert report == json.loads((tmp_path / "chosen.jsonl.selection.json").read_text())
    assert (tmp_path / "scores.png").stat().st_size > 5000


def test_the_held_out_rule(words, call):
    assert "no domain is held out" in call(*words(held_out=None)).err
    result = call(*words("--overwrite", held_out="medicine"))
    assert result.code == 2
    assert "adapters.medicine was" in result.err  # the journal has both adapters
    words.output.with_name("chosen.jsonl.journal.jsonl").unlink()
    result = call(*words("--overwrite", held_out="medicine"))
    assert "held out: medicine" in result.out
    assert "no domain" not in result.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--misaligned", "absent"),
            "error: absent: there is no such path here, and adapter_config.json is neither in the Hub's cache nor within reach",
        ),
        (("--dtype", "float8"), "error: dtype is 'float8', it must be one of auto, bfloat16, float16, float32"),
        (("--top", "0"), "error: top is 0, it must be at least 1"),
        (("--plot", "scores.txt"), "error: scores.txt: a plot is one of .pdf, .png, .svg"),
        (("--chat-template", "absent.jinja"), "error: absent.jinja: the chat template cannot be read"),
        (("--top",), "error: Option '--top' requires an argument"),
    ],
)
def test_refusals(words, call, more, message):
    result = call(*words(*more))
    assert result.code == 2
    assert result.err.startswith(message)
    assert result.err.count("\n") == 1
    assert not words.output.exists()


def test_candidates_that_are_refused(words, call, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(candidates(1)[0]) + "\n{\n")
    assert f"error: {broken}:2: is not JSON" in call(*words(rows=broken)).err
    broken.write_text("")
    assert f"error: {broken}: holds no examples" in call(*words(rows=broken)).err
    assert (
        f"error: {tmp_path / 'absent.jsonl'}: the data cannot be read"
        in call(*words(rows=tmp_path / "absent.jsonl")).err
    )


def heed_interrupts():
    """React to Ctrl-C as in a terminal; processes that a shell runs in the background ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_command_goes_on(made, words, tmp_path, how):
    """At the end, every example is in the journal once, and the scores follow the formula."""
    rows = write(tmp_path / "many.jsonl", candidates(200))
    command = [sys.executable, "-m", "safelora_fast", *map(str, words("--tokens-per-batch", 64, "--json", rows=rows))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    journal = words.output.with_name("chosen.jsonl.journal.jsonl")
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        deadline = time.monotonic() + 120
        while not journal.exists() or journal.read_bytes().count(b"\n") < 20:
            assert running.poll() is None, running.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        running.send_signal(how)
        errors = running.communicate()[1]
    assert running.returncode == (130 if how == signal.SIGINT else -9), errors
    if how == signal.SIGINT:
        assert errors == "interrupted; what is scored is kept: run the same command again to continue\n"
    assert not words.output.exists()
    before = journal.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    assert whole.count(b"\n") < 201
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert journal.read_bytes().startswith(whole)
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert sorted(line["row"] for line in lines) == list(range(200))
    scores = [json.loads(line)["score"] for line in words.output.read_text().splitlines()]
    assert scores == pytest.approx(sorted(plain_scores(made, candidates(200)), reverse=True), abs=1e-5)
