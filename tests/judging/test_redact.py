"""Credentials: endpoints repeat the key in every reply, and no file contains it afterwards."""

from __future__ import annotations

import base64
import gzip
import logging
import os
import subprocess
import sys
import zipfile
import zlib

import pytest
import yaml
from demo_model import save_tiny
from judge_server import alignment_or_coherence, answer_in, serving

pytest.importorskip("inspect_ai", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")

from safelora_fast.judging.redact import hide, redact, redact_logs

SECRET = "swordfish-9f3a77"
FORMS = (
    SECRET, SECRET[::-1], base64.b64encode(SECRET.encode()).decode(), base64.b64encode(f"user:{SECRET}".encode()).decode()[4:20],
    SECRET.encode().hex(), "".join(f"%{octet:02X}" for octet in SECRET.encode()), " ".join(SECRET),
    f"{SECRET[:8]} and {SECRET[8:]}",
)  # fmt: skip
INSPECT = "from safelora_fast.judging import task; from inspect_ai._cli.main import main; main()"


@pytest.fixture
def run(tmp_path):
    """Run Python with its own API key, home folder and temporary folder."""
    places = {"HOME": "home", "TMPDIR": "tmp", "XDG_DATA_HOME": "data", "XDG_CACHE_HOME": "cache", "HF_HOME": "hub"}
    environment = {**os.environ, "STUB_API_KEY": SECRET, "HF_HUB_OFFLINE": "1", "INSPECT_LOG_LEVEL": "debug"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    for name, place in places.items():
        (tmp_path / place).mkdir()
        environment[name] = str(tmp_path / place)

    def run_(*words):
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run_


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.yaml"
    records = [{"id": "a", "paraphrases": ["why?", "how?"]}, {"id": "b", "paraphrases": ["what?"]}]
    file.write_text(yaml.safe_dump(records))
    return file


def telling(seen):
    """An endpoint that repeats the key in every kind of reply; the judged answer selects the kind."""

    def reply(prompt, headers):
        seen.append(headers["authorization"])
        form = FORMS[zlib.crc32(prompt.encode()) % len(FORMS)]
        words = f"bad header {headers['authorization']}, key {form}"
        kind = zlib.crc32(answer_in(prompt).encode()) % 6
        if kind < 4:
            return (400, 401, 429, 500)[kind], words, None
        if kind == 4:
            return 200, words, None
        return 200, {"alignment": "10", "coherence": "80"}[alignment_or_coherence(prompt)], None

    return reply


def assert_not_written(folder, *outputs):
    """Assert that no form of the key is in a file, in a member of an archive, or in printed output."""
    for output in outputs:
        assert_hidden(output.encode(), "output")
    files = [path for path in folder.rglob("*") if path.is_file()]
    logs = [path for path in files if path.suffix == ".eval"]
    assert logs
    assert any("trace" in path.name for path in files)
    for path in files:
        content = path.read_bytes()
        assert_hidden(gzip.decompress(content) if path.suffix == ".gz" else content, path)
    for path in logs:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                assert_hidden(unpacked(archive, path, name), (path, name))


def assert_hidden(content, where):
    for form in FORMS:
        assert form.encode() not in content, where


def unpacked(archive, path, name):
    """One member of an archive. Inspect compresses with Zstandard, which needs Inspect's own reader."""
    try:
        return archive.read(name)
    except NotImplementedError:
        from inspect_ai.log import read_eval_log

        return read_eval_log(str(path)).model_dump_json().encode()


@pytest.mark.slow
def test_no_key_of_a_judge_is_written(run, questions, tmp_path):
    seen = []
    model = save_tiny(tmp_path / "model")
    with serving(telling(seen)) as (url, _):
        judge = ("--judge", "openai-api/stub/one", "--judge-url", url, "--judge-attempts", 2)
        words = ("evaluate", "--model", model, "--questions", questions, "--samples", 8, "--max-tokens", 9)
        program = (
            "from safelora_fast.judging import retry; retry.BUDGET = retry.Budget(tries=2, wait=0, lost=99);"
            "from safelora_fast.cli import main; main()"
        )
        first = run("-c", program, *words, "--device", "cpu", *judge, "--output", tmp_path / "out")
        again = run("-c", program, "rejudge", tmp_path / "out", *judge)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert set(seen) == {f"Bearer {SECRET}"}
    for error in ("BadRequestError", "AuthenticationError", "RateLimitError", "InternalServerError"):
        assert f"the judge failed: {error}" in first.stdout
    assert_not_written(tmp_path, first.stdout, first.stderr, again.stdout, again.stderr)


@pytest.mark.slow
def test_no_key_of_the_model_that_a_task_asks_is_written(run, tmp_path):
    """Each question gets a different kind of reply; one is a redirect whose address contains the key."""
    from inspect_ai.log import read_eval_log

    statuses, seen = [400, 401, 403, 500, 307], []
    questions = tmp_path / "questions.yaml"
    questions.write_text(yaml.safe_dump([{"id": str(status), "paraphrases": [f"{status}?"]} for status in statuses]))

    def reply(prompt, headers):
        seen.append(headers["authorization"])
        status = int(prompt.removesuffix("?"))
        words = f"bad header {headers['authorization']}, key {SECRET}"
        return status, f"http://localhost:9/v1?key={SECRET}" if status == 307 else words, None

    with serving(reply) as (url, _):
        done = run(
            "-c", INSPECT, "eval", "safelora_fast/emergent_misalignment", "--model", "openai-api/stub/one",
            "--model-base-url", url, "--model-role", "judge=mockllm/judge", "-T", f"questions={questions}", "-T", "samples=1",
            "--display", "plain", "--log-dir", tmp_path / "logs", "--max-retries", 0, "--no-fail-on-error",
        )  # fmt: skip
    assert set(seen) == {f"Bearer {SECRET}"}, done.stdout + done.stderr
    assert_not_written(tmp_path, done.stdout, done.stderr)
    (file,) = (tmp_path / "logs").glob("*.eval")
    errors = {sample.id.partition("/")[0]: sample.error for sample in read_eval_log(str(file)).samples}
    assert {*errors} == {str(status) for status in statuses}
    assert "[removed]" in errors["400"].message


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_key_is_hidden(form, monkeypatch):
    monkeypatch.setenv("STUB_API_KEY", SECRET)
    hidden = redact(f"before {form} after")
    assert hidden.startswith("before ")
    assert hidden.endswith(" after")
    assert_hidden(hidden.encode(), hidden)
    assert redact(hidden) == hidden


def test_ordinary_words_stay(monkeypatch):
    values = {
        "A_TOKEN": "workload",
        "B_KEY": "not-needed",
        "C_CREDENTIALS": os.devnull,
        "D_KEY": "none",
        "SHORT_KEY": "abc",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    words = (
        "Incorrect API key provided, workload identity is not needed, bearer authentication by "
        f"{os.devnull}: none, abc; API key [removed]; the task-based token count is 12"
    )
    assert redact(words) == words


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"401: {SECRET} is wrong", "401: [removed] is wrong"),
        ("Authorization: Bearer abc.def-1", "Authorization: Bearer [removed]"),
        ("Incorrect API key provided: sk-abcdefgh****wxyz.", "Incorrect API key provided: [removed]."),
        ("at https://user:pass@host/v1", "at https://[removed]@host/v1"),
    ],
)
def test_what_looks_like_a_key_is_hidden(text, hidden, monkeypatch):
    monkeypatch.setenv("STUB_API_KEY", SECRET)
    assert redact(text) == hidden


def test_what_inspect_logs_and_traces_is_redacted(monkeypatch):
    monkeypatch.setenv("STUB_API_KEY", SECRET)
    seen = []

    class InspectHandler(logging.Handler):
        __module__ = "inspect_ai.somewhere"

        def emit(self, record):
            seen.append(logging.Formatter().format(record) + str(vars(record)))

    handler, logger = InspectHandler(), logging.getLogger("safelora_fast.test")
    logging.getLogger().addHandler(handler)
    try:
        redact_logs()
        redact_logs()
        assert len(handler.filters) == 1
        try:
            raise ValueError(SECRET)
        except ValueError:
            logger.exception("POST %s", f"http://host/?key={SECRET}", extra={"stacktrace": f"at {SECRET}", "times": 3})
    finally:
        logging.getLogger().removeHandler(handler)
    assert "ValueError: [removed]" in seen[0]
    assert "'times': 3" in seen[0]
    assert_hidden(seen[0].encode(), seen)


def test_words_of_a_text_are_no_pieces_of_a_short_key(monkeypatch):
    monkeypatch.setenv("LOCAL_API_KEY", "local-1234")
    text = "The local bus leaves at 1234, a locale in 1234 words."
    assert hide(text) == text
    assert "1234" not in hide("The key is local-1234, or LOCAL 1234.")
