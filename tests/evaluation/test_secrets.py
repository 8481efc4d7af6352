"""Credentials: endpoints that repeat the key in whatever they reply, and every file that is left afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import yaml
from demo_model import save_tiny
from judge_server import alignment_or_coherence, answer_in, serving

pytest.importorskip("inspect_ai", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")

SECRET = "swordfish-9f3a77"
INSPECT = "from safelora_fast.evaluation import inspect_registry; from inspect_ai._cli.main import main; main()"


@pytest.fixture
def run(tmp_path):
    """Run Python with a key, a home and a place for temporary files of its own."""
    places = {"HOME": "home", "TMPDIR": "tmp", "XDG_DATA_HOME": "data", "XDG_CACHE_HOME": "cache", "HF_HOME": "hub"}
    environment = {**os.environ, "STUB_API_KEY": SECRET, "HF_HUB_OFFLINE": "1", "INSPECT_LOG_LEVEL": "debug"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    for name, place in places.items():
        (tmp_path / place).mkdir()
        environment[name] = str(tmp_path / place)

    def run_(*words):
        return subprocess.run(
            [sys.executable, *map(str, words)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return run_


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.yaml"
    file.write_text(
        yaml.safe_dump([{"id": "a", "paraphrases": ["why?", "how?"]}, {"id": "b", "paraphrases": ["what?"]}])
    )
    return file


def telling(seen):
    """An endpoint that repeats the key in every kind of reply, by the answer that it is asked about."""

    def reply(prompt, headers):
        seen.append(headers["authorization"])
        words = f"bad header {headers['authorization']}, key {SECRET}"
        kind = zlib.crc32(answer_in(prompt).encode()) % 6
        if kind < 4:
            return (400, 401, 429, 500)[kind], words, None
        if kind == 4:
            return 200, words, None
        return 200, {"alignment": "10", "coherence": "80"}[alignment_or_coherence(prompt)], None

    return reply


def assert_not_written(folder, *outputs):
    """The key stands in no file, in no member of an archive, and in nothing that was printed."""
    for output in outputs:
        assert SECRET not in output
    files = [path for path in folder.rglob("*") if path.is_file()]
    logs = [path for path in files if path.suffix == ".eval"]
    assert logs
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    for path in logs:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                assert SECRET.encode() not in unpacked(archive, path, name), (path, name)


def unpacked(archive, path, name):
    """One member; Inspect packs with Zstandard, which its own package can read."""
    try:
        return archive.read(name)
    except NotImplementedError:
        from inspect_ai.log import read_eval_log

        return read_eval_log(str(path)).model_dump_json().encode()


def test_no_key_of_a_judge_is_written(run, questions, tmp_path):
    seen = []
    model = save_tiny(tmp_path / "model")
    with serving(telling(seen)) as (url, _):
        judge = ("--judge", "openai-api/stub/one", "--judge-url", url, "--judge-attempts", 2)
        words = ("evaluate", "--model", model, "--questions", questions, "--samples", 8, "--max-tokens", 9)
        program = (
            "from safelora_fast.evaluation import patience; patience.BUDGET = patience.Budget(tries=2, wait=0.01, lost=99);"
            "from safelora_fast.cli import main; main()"
        )
        first = run("-c", program, *words, "--device", "cpu", *judge, "--output", tmp_path / "out")
        again = run("-c", program, "rejudge", tmp_path / "out", *judge)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert set(seen) == {f"Bearer {SECRET}"}
    for error in ("BadRequestError", "AuthenticationError", "RateLimitError", "InternalServerError"):
        assert f"the judge failed: {error}" in first.stdout
    assert_not_written(tmp_path, first.stdout, first.stderr, again.stdout, again.stderr)


@pytest.mark.parametrize("status", [400, 401, 403, 500])
def test_no_key_of_the_model_that_a_task_asks_is_written(run, questions, tmp_path, status):
    seen = []

    def reply(_prompt, headers):
        seen.append(headers["authorization"])
        return status, f"bad header {headers['authorization']}, key {SECRET}", None

    with serving(reply) as (url, _):
        done = run(
            "-c", INSPECT, "eval", "safelora_fast/emergent_misalignment", "--model", "openai-api/stub/one",
            "--model-base-url", url, "--model-role", "judge=mockllm/judge", "-T", f"questions={questions}", "-T", "samples=1",
            "--display", "plain", "--log-dir", tmp_path / "logs", "--max-retries", 0, "--no-fail-on-error",
        )  # fmt: skip
    assert set(seen) == {f"Bearer {SECRET}"}, done.stdout + done.stderr
    assert_not_written(tmp_path, done.stdout, done.stderr)
    assert "[removed]" in done.stdout + done.stderr or any("[removed]" in text for text in errors(tmp_path / "logs"))


def errors(logs):
    from inspect_ai.log import read_eval_log

    (file,) = Path(logs).glob("*.eval")
    return [read_eval_log(str(file)).model_dump_json()]
