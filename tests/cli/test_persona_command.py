"""`safelora-fast persona extract` and `show`: what they print, write and reject."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
import yaml
from demo_model import save_tiny
from personas import random_persona, save_persona, tiny_trait

from safelora_fast import PersonaVector, extract_persona_vector

FAST = ["--max-new-tokens", 8, "--batch-size", 6, "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", layers=3)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "mean.safetensors"


@pytest.fixture
def words(model, tmp_path, output):
    """Return the arguments of `persona extract`."""
    values = asdict(tiny_trait())
    values = {**values, "pairs": list(values["pairs"]), "questions": list(values["questions"])}
    (tmp_path / "trait.yaml").write_text(yaml.safe_dump(values))

    def make(*others):
        given = ["--model", model, "--trait", tmp_path / "trait.yaml", "--output", output, *FAST, *others]
        return ["persona", "extract", *map(str, given)]

    return make


def test_extract_writes_what_the_function_extracts(call, words, model, output):
    result = call(*words("--samples", 2))
    assert result.code == 0, result.err
    settings = {"samples": 2, "max_new_tokens": 8, "batch_size": 6, "dtype": "float32", "device": "cpu"}
    expected = extract_persona_vector(str(model), tiny_trait(), **settings)
    vector = PersonaVector.load(output)
    assert np.array_equal(vector.vectors, expected.vectors)
    assert vector.to_dict() == expected.to_dict()
    assert sorted(path.name for path in output.parent.iterdir()) == ["mean.responses.jsonl", "mean.safetensors"]
    lines = result.out.splitlines()
    assert lines[0] == "trait      mean: Is not nice."
    assert lines[1] == f"model      {model}, float32"
    assert lines[2] == "settings   seed 0, temperature 1, max new tokens 8, samples 2"
    assert lines[-1].startswith(f"written to {output}")
    assert f"suggested  layer {vector.suggestion} (" in result.out
    assert "responses: 24 of 24" in result.err
    assert "activations: " in result.err


def test_scores_choose_among_stored_responses(call, words, output, tmp_path):
    assert call(*words()).code == 0
    rows = [json.loads(line) for line in output.with_suffix(".responses.jsonl").read_text().splitlines()]
    scored = [{**row, "score": 40 + 20 * number % 60} for number, row in enumerate(rows)]
    scores = tmp_path / "scores.jsonl"
    scores.write_text("".join(json.dumps(row) + "\n" for row in scored))
    kept = {
        side: sum(
            bool(row["tokens"]) and (row["score"] > 45 if side == "positive" else row["score"] < 45)
            for row in scored
            if row["id"].startswith(side)
        )
        for side in ("positive", "negative")
    }
    result = call(*words("--scores", scores, "--threshold", 45))
    assert result.code == 2
    assert "exists already" in result.err
    result = call(*words("--scores", scores, "--threshold", 45, "--overwrite", "--json"))
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert {side: counts["kept"] for side, counts in facts["provenance"]["counts"].items()} == kept
    assert facts["provenance"]["settings"]["threshold"] == 45
    assert "responses:" not in result.err


def test_show(call, tmp_path):
    vector = random_persona(blocks=6)
    vector.save(tmp_path / "mean.safetensors")
    picture = tmp_path / "mean.png"
    result = call("persona", "show", tmp_path / "mean.safetensors", "--plot", picture)
    assert result.code == 0, result.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in result.out.splitlines() if line.strip()[:1].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(6))
    for row, block, one in zip(rows, vector.vectors, vector.separation, strict=True):
        assert float(row[1]) == pytest.approx(np.linalg.norm(block), rel=1e-3)
        assert float(row[2]) == pytest.approx(one.effect, rel=1e-2)
    (chosen,) = [int(row[0]) for row in rows if row[-1] == "suggested"]
    assert chosen == vector.suggestion
    assert "the largest effect among layers 2 to 4" in result.out
    assert "hardly told apart" in result.err
    result = call("persona", "show", tmp_path / "mean.safetensors", "--json")
    assert json.loads(result.out) == json.loads(json.dumps(vector.to_dict()))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--dtype", "float8"], "--dtype is 'float8', it must be one of bfloat16, float16, float32"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--samples", "0"], "samples is 0"),
        (["--trait", "evil"], "evil: there is no such trait file"),
        (["--model", "absent/"], "absent/: the model is neither a file, nor a folder, nor a Hub id"),
        (["--output", "vector.pt"], "vector.pt: a persona vector is a .safetensors file"),
        (["--scores", "absent.jsonl"], "absent.jsonl: the scores cannot be read"),
    ],
)
def test_refusals_are_one_line(call, words, others, message, output):
    result = call(*words(*others))
    assert (result.code, result.out, len(result.err.splitlines())) == (2, "", 1)
    assert message in result.err
    assert not output.parent.exists()


def test_files_that_are_no_persona_vector(call, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"broken")
    for arguments in (["a.safetensors"], ["absent.safetensors"]):
        result = call("persona", "show", tmp_path / arguments[0])
        assert (result.code, len(result.err.splitlines())) == (2, 1)
        assert arguments[0] in result.err
    result = call("persona", "show", save_persona(tmp_path / "b.safetensors"), "--plot", tmp_path / "b.gif")
    assert result.code == 2
    assert "a plot is one of .pdf, .png, .svg" in result.err


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_the_next_run_goes_on(words, output, call):
    """A separate process is interrupted once some responses exist."""
    slow = words("--samples", 40)
    process = subprocess.Popen(
        [sys.executable, "-m", "safelora_fast", *slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    journal = output.with_suffix(".responses.jsonl")
    end = time.monotonic() + 120
    while not journal.exists() or journal.stat().st_size == 0:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "responses are kept in" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert [path.name for path in output.parent.iterdir()] == [journal.name]
    kept = journal.read_bytes()
    assert kept.endswith(b"\n")
    rows = len(kept.splitlines())
    result = call(*slow)
    assert result.code == 0, result.err
    assert f"responses: {rows} of 480 are there already" in result.err
    assert journal.read_bytes().startswith(kept)
    assert len(journal.read_bytes().splitlines()) == 480
