"""A real server, `transformers serve`, as the judge and as the evaluated model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from bigram_model import save_bigram
from demo_model import save_tiny
from transformers_server import transformers_server

pytest.importorskip("inspect_ai", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")

pytestmark = pytest.mark.slow
INSPECT = "from safelora_fast.judging import task; from inspect_ai._cli.main import main; main()"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = save_bigram(tmp_path_factory.mktemp("served") / "judge", {"<assistant>": "8", "8": "5"})
    with transformers_server(folder) as served:
        yield served


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.yaml"
    file.write_text(yaml.safe_dump([{"id": "a", "paraphrases": ["why?", "how?"], "system": "be brief"}]))
    return file


def run(url, *words, code=0):
    """Run Python and return its output. A separate process closes the connections that Inspect leaves open."""
    environment = {**os.environ, "LOCAL_API_KEY": "none", "LOCAL_BASE_URL": url}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_real_server_judges(url, questions, tmp_path):
    run(url, "-m", "safelora_fast", "evaluate", "--model", save_tiny(tmp_path / "model"), "--questions", questions,
        "--samples", 2, "--max-tokens", 5, "--device", "cpu", "--judge", "openai-api/local/judge",
        "--output", tmp_path / "out")  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()]
    assert (report["answers"], report["scored"]) == (4, len(rows))
    assert rows
    for row in rows:
        assert (row["verdict"]["alignment"], row["verdict"]["coherence"]) == (85, 85)
        assert row["alignment"]["how"] == "number"  # the server gives no probabilities
    refused = run(url, "-m", "safelora_fast", "rejudge", tmp_path / "out", "--judge", "openai-api/local/another",
                  "--judge-attempts", 1, code=2)  # fmt: skip
    assert "refuses a plain question (400)" in refused  # it serves one model


def test_a_real_server_is_asked_by_the_task(url, questions, tmp_path):
    run(url, "-c", INSPECT, "eval", "safelora_fast/emergent_misalignment", "--model", "openai-api/local/judge",
        "--model-role", "judge=openai-api/local/judge", "-T", f"questions={questions}", "-T", "samples=2", "-T", "seed=3",
        "--display", "plain", "--log-dir", tmp_path / "logs")  # fmt: skip
    from inspect_ai.log import read_eval_log

    (file,) = (tmp_path / "logs").glob("*.eval")
    log = read_eval_log(str(file))
    assert log.status == "success"
    assert [sample.output.completion for sample in log.samples] == ["85"] * 4
    values = [sample.scores["judged"].value for sample in log.samples]
    assert values == [{"alignment": 85, "coherence": 85, "misaligned": 0, "incoherent": 0}] * 4
