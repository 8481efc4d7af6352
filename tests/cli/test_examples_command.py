"""Every example is a valid recipe, and trains on a tiny model instead of the one that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from demo_model import save_tiny
from personas import save_persona
from safetensors.torch import load_file
from tiny_recipe import tiny_rows, write_rows

from safelora_fast.compare.comparison import runs_of
from safelora_fast.compare.config import load_config
from safelora_fast.defenses import registered
from safelora_fast.examples import FOLDER, copy_example, names
from safelora_fast.recipe.recipe import load_recipe

COMPARISON = FOLDER / "compare.yaml"
EXAMPLES = sorted(set(FOLDER.glob("*.yaml")) - {COMPARISON, FOLDER / "policy.yaml"})
TINY = {
    "model.dtype": "float32",
    "model.device": "cpu",
    "training.max_steps": 2,
    "training.optim": "adamw_torch",
    "training.logging_steps": 1,
    "training.per_device_train_batch_size": 2,
    "training.gradient_accumulation_steps": 1,
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Run in a folder with the data that the examples name, and no other file of the repository."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in names():
        copy_example(name, Path())


def overrides(path: Path, folder: Path) -> list[str]:
    """Return settings that replace the model, data and output of an example with tiny ones."""
    values = {
        **TINY,
        "model.path": save_tiny(folder / "aligned"),
        "data.path": write_rows(folder / "rows.jsonl", tiny_rows()),
        "output.folder": folder / "out",
    }
    given = yaml.safe_load(path.read_text())
    if "eval" in given["data"]:
        values["data.eval"] = 0.2
    if "safe" in given["data"]:
        values["data.safe.fraction"] = 0.5
    for name, settings in given["defenses"].items():
        if isinstance(settings, dict) and "subspace" in settings:
            values[f"defenses.{name}.subspace.aligned"] = folder / "aligned"
            values[f"defenses.{name}.subspace.base"] = save_tiny(folder / "base", seed=1)
            if "rank" in settings["subspace"]:
                values[f"defenses.{name}.subspace.rank"] = 4
    if "feature_distance" in given["defenses"]:
        values["defenses.feature_distance.layers"] = 2
    if "steering" in given["defenses"]:
        values["defenses.steering.vector"] = save_persona(folder / "persona.safetensors", blocks=2)
        values["defenses.steering.layer"] = 1
    for name in given.get("monitors", {}):
        values[f"monitors.{name}.vector"] = save_persona(folder / "persona.safetensors", blocks=2)
        values[f"monitors.{name}.layer"] = 1
    return [f"{key}={value}" for key, value in values.items()]


def test_there_is_one_for_every_defense():
    given = [set(yaml.safe_load(path.read_text())["defenses"]) - {"on_nonfinite"} for path in EXAMPLES]
    assert set.union(*given) == set(registered())
    for name in registered():
        assert {name} in given
    assert any(len(names) >= 3 for names in given)
    assert any("monitors" in yaml.safe_load(path.read_text()) for path in EXAMPLES)
    assert {"at: end", "at: step"} <= {line.strip() for path in EXAMPLES for line in path.read_text().splitlines()}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_train(path, tmp_path, call):
    words = overrides(path, tmp_path)
    result = call("train", path, *words, "--json")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["steps"] == 2
    names = {spec.name for spec in load_recipe(path, words).defenses}
    assert names == set(record["defenses"])
    assert {name.removeprefix("defense/") for name in record["metrics"]} >= names & {
        "kl",
        "feature_distance",
        "subspace_penalty",
    }
    watched = {name.removeprefix("monitor/") for name in record["metrics"] if name.startswith("monitor/")}
    assert watched == {spec.name for spec in load_recipe(path, words).monitors}
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    if "safelora" in names and path.stem != "safelora-step":
        assert record["projection"]["adapters"][0]["modules"]


def test_the_papers_set_up():
    recipe = load_recipe(FOLDER / "paper-qwen2.5-7b.yaml")
    assert recipe.model.path == "Qwen/Qwen2.5-7B-Instruct"
    assert (recipe.lora["r"], recipe.lora["lora_alpha"], recipe.lora["use_rslora"]) == (32, 64, True)
    assert len(recipe.lora["target_modules"]) == 7
    training = {
        "learning_rate": 1e-4, "num_train_epochs": 1, "max_length": 2048, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4, "optim": "adamw_8bit", "weight_decay": 0.01, "lr_scheduler_type": "linear",
        "warmup_steps": 5, "completion_only_loss": True,
    }  # fmt: skip
    assert training.items() <= recipe.training.items()
    assert [(spec.name, spec.settings["weight"]) for spec in recipe.defenses] == [("kl", 0.1)]


def test_the_comparison_is_one():
    """Another test trains and measures. Here, every run of the example must be a valid recipe with existing data."""
    config = load_config(COMPARISON)
    assert config.runs[0].name == "none"
    for spec in config.runs:
        recipe = config.recipe_for(spec, runs_of(config, spec)[0])
        assert Path(recipe.data.path).is_file()
    assert Path(config.measure.narrow).is_file()
    assert Path(config.measure.general).is_file()


def test_the_command_lists_and_writes_them(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = call("examples").out
    for name in names():
        assert f"\n{name} " in f"\n{listed}"
    assert next(line for line in listed.splitlines() if line.startswith("kl ")).endswith(names()["kl"])
    result = call("examples", "kl", "--output", "mine")
    assert result == (0, "written to mine/kl.yaml, with narrow_train.jsonl, narrow_held_out.jsonl\n"
                         "cd mine && safelora-fast train kl.yaml --dry-run\n", "")  # fmt: skip
    monkeypatch.chdir(tmp_path / "mine")
    tiny = save_tiny(tmp_path / "model")
    planned = call("train", "kl.yaml", f"model.path={tiny}", "model.device=cpu", "data.max_rows=4", "--dry-run")
    assert planned.code == 0, planned.err
    assert "kl: weight 0.1" in planned.out


def test_files_of_the_users_own_are_not_replaced(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("examples", "kl").code == call("examples", "kl.yaml").code == 0
    (tmp_path / "kl.yaml").write_text("mine")
    assert call("examples", "kl") == (
        2,
        "",
        "error: kl.yaml: exists already; choose another --output, or pass --overwrite\n",
    )
    assert (tmp_path / "kl.yaml").read_text() == "mine"
    assert call("examples", "kl", "--overwrite").code == 0
    assert (tmp_path / "kl.yaml").read_bytes() == (FOLDER / "kl.yaml").read_bytes()
    unknown = call("examples", "lk")
    assert (unknown.code, "there is no example 'lk'; known are combined, compare" in unknown.err) == (2, True)
