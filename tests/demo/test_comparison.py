"""`demo --train`: its configuration is whole, what the runs need is made when they need it, and `compare` takes it from there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from demo_model import save_tiny

from safelora_fast.compare.columns import DIVERGENCE, LEARNED
from safelora_fast.compare.compare import compare
from safelora_fast.demo import comparison, text
from safelora_fast.demo.constants import Recipe
from safelora_fast.persona_vector import PersonaVector
from safelora_fast.subspace.safe_subspace import SafeSubspace

RECIPE = Recipe(base_epochs=1, base_rate=1e-3, adapter_epochs=1, rank=4, chosen=3, persona_tokens=8)
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


def test_the_packaged_configuration_is_whole(source, tmp_path):
    """Every run's recipe is checked, and every placeholder stands for something that is there."""
    config = comparison.configure(tmp_path, seed=3, source=source, recipe=RECIPE)
    assert [run.name for run in config.runs][:2] == ["no defense", "KL"]
    assert (len(config.runs), config.seeds) == (10, (3,))
    recipes = {run.name: config.recipe_for(run, 3, tmp_path / "run") for run in config.runs}
    chosen = recipes["interleaving++ (chosen)"].data.safe.path
    pool = {row.prompt for name in ("safe", "safe_pool") for row in text.rows(name)}
    rows = [json.loads(line) for line in Path(chosen).read_text(encoding="utf-8").splitlines()]
    assert len(rows) == RECIPE.chosen
    assert {row["prompt"] for row in rows} <= pool
    [steering] = recipes["steering"].defenses
    vector = PersonaVector.load(steering.settings["vector"])
    assert steering.settings["layer"] in {vector.suggestion, *vector.candidates}
    [penalty] = recipes["subspace penalty"].defenses
    assert SafeSubspace.load(penalty.settings["subspace"]) is not None


def test_the_comparison_runs(source, tmp_path):
    config = comparison.configure(tmp_path, source=source, recipe=RECIPE, configuration=SMALL)
    assert not list(tmp_path.glob("train-*")), "nothing is made that no run needs"
    report = compare(config, talk=False)
    assert report.complete
    _, undefended, projected = report.rows
    assert [row.kind for row in report.rows] == ["reference", "undefended", "defence"]
    assert undefended.cells[LEARNED].value > 0
    assert projected.cells[DIVERGENCE].value != undefended.cells[DIVERGENCE].value
    assert "<svg" in (tmp_path / "comparison" / "report.html").read_text("utf-8")
