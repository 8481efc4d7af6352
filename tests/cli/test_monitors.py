"""Monitors and persona files in a recipe."""

from __future__ import annotations

import json
import math

import pytest
from personas import save_persona
from tiny_recipe import difference, write_recipe

from safelora_fast.errors import SettingsError
from safelora_fast.models.quiet_libraries import quiet_libraries
from safelora_fast.recipe.prepare import prepare
from safelora_fast.recipe.recipe import load_recipe
from safelora_fast.recipe.run import train


@pytest.fixture(autouse=True)
def quiet():
    with quiet_libraries():
        yield


@pytest.fixture
def persona(tmp_path):
    return str(save_persona(tmp_path / "malicious.safetensors", blocks=2))


def run(folder, **sections):
    """Train in a folder, and return the recipe and the record."""
    tiny = write_recipe(folder, **sections)
    train(prepare(load_recipe(tiny.path)), resume=False, command="", talk=False)
    return tiny, tiny.record()


@pytest.mark.parametrize("defenses", [{}, {"kl": {"weight": 0.5}}], ids=["alone", "beside a kl"])
def test_a_monitor_is_logged_and_changes_no_weight(tmp_path, persona, defenses):
    plain, _ = run(tmp_path / "plain2", defenses=defenses or None)
    watched, record = run(
        tmp_path / "watched",
        defenses=defenses or None,
        monitors={"malicious": {"vector": persona, "layer": 1}, "first": {"vector": [1.0] * 32, "layer": -2}},
    )
    assert difference(plain.weights(), watched.weights()) == 0
    for name in ("monitor/malicious", "monitor/first"):
        figures = record["metrics"][name]
        assert all(math.isfinite(figures[which]) for which in ("first", "last", "mean"))
        assert figures["first"] != figures["last"]
    assert set(record["defenses"]) == set(defenses)
    assert record["recipe"]["monitors"]["malicious"] == {"vector": persona, "layer": 1}
    card = (watched.output / "README.md").read_text()
    assert f"| monitor/malicious | {record['metrics']['monitor/malicious']['first']:.4g} |" in card


def test_a_persona_file_steers(tmp_path, persona):
    steering = {"steering": {"vector": persona, "layer": 1, "coefficient": 2.0}}
    steered, record = run(tmp_path / "steered", defenses=steering)
    plain, _ = run(tmp_path / "plain", defenses=None)
    assert difference(steered.weights(), plain.weights()) > 1e-4
    assert record["defenses"]["steering"]["settings"] == {"vector": persona, "layer": 1, "coefficient": 2.0}


def test_what_does_not_fit_the_model_is_refused_before_weights_are_loaded(tmp_path):
    deep = str(save_persona(tmp_path / "deep.safetensors", blocks=3))
    wanted = {"vector": deep, "layer": 1}
    for section in ({"defenses": {"steering": wanted}}, {"monitors": {"m": wanted}}):
        tiny = write_recipe(tmp_path / "run", **section)
        (tiny.model / "model.safetensors").unlink()
        with pytest.raises(SettingsError, match=r"deep.safetensors has vectors of 3 layers, the model has 2"):
            prepare(load_recipe(tiny.path))


def test_the_plan_names_monitors_and_its_output_spares_their_files(tmp_path, persona, call):
    tiny = write_recipe(tmp_path / "run", monitors={"malicious": {"vector": persona, "layer": 1}})
    result = call(*tiny.words("--dry-run"))
    assert result.code == 0, result.err
    assert f"malicious: vector {persona}, layer 1; changes nothing" in result.out
    result = call(*tiny.words(f"output.folder={tmp_path}", "--overwrite"))
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "must not contain one another" in result.err


def test_resume_refuses_another_monitor(tmp_path, persona, call):
    monitors = {"malicious": {"vector": persona, "layer": 1}}
    tiny, record = run(tmp_path / "run", monitors=monitors)
    unfinished = {**record, "finished": False}
    (tiny.output / "safelora_train.json").write_text(json.dumps(unfinished))
    result = call(*tiny.words("--resume", "monitors.malicious.layer=0"))
    assert result.code == 2
    assert "monitors.malicious.layer was 1, is 0" in result.err
