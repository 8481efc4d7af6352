"""Recipes as YAML: numbers, line numbers, overrides, and invalid files."""

from __future__ import annotations

import dataclasses

import pytest

from safelora_fast.configuration.signatures import dataclass_fields
from safelora_fast.configuration.synonyms import SYNONYMS
from safelora_fast.configuration.yaml_document import read_document
from safelora_fast.defenses import registered
from safelora_fast.errors import SettingsError
from safelora_fast.models.model_settings import ModelSection
from safelora_fast.recipe.lora_and_trainer_sections import LORA, TRAINING
from safelora_fast.recipe.recipe import SECTIONS, load_recipe
from safelora_fast.recipe.sections import DataSection, OutputSection

TEXT = """\
model:
  path: here
training:
  learning_rate: 1e-4
  steps: [1, 2]
  inner:
    deep: true
"""


@pytest.fixture
def document(tmp_path):
    def make(text=TEXT, *overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return read_document(path, overrides)

    return make


def test_values_and_lines(document):
    read = document()
    assert read.values == {
        "model": {"path": "here"},
        "training": {"learning_rate": 1e-4, "steps": [1, 2], "inner": {"deep": True}},
    }
    assert isinstance(read.values["training"]["learning_rate"], float)
    assert read.lines["training", "inner", "deep"] == 7
    assert str(read.problem(("training", "learning_rate"), "bad")).endswith(
        "recipe.yaml:4: training.learning_rate: bad"
    )
    assert str(read.problem(("training", "absent"), "missing")).endswith("recipe.yaml:3: training.absent: missing")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("-2E3", -2000.0), ("1.5e2", 150.0), (".5e1", 5.0), ("12", 12), ("1e", "1e"), ("e4", "e4"),
     ("'1e-4'", "1e-4"), ("-.inf", float("-inf")), ("true", True), ("False", False), ("no", "no"), ("on", "on"),
     ("null", None), ("~", None)],
)  # fmt: skip
def test_scalars(document, text, value):
    read = document(f"a: {text}\n").values["a"]
    assert read == value
    assert type(read) is type(value)


def test_overrides(document):
    read = document(
        TEXT, "training.learning_rate=2e-5", "training.inner.deep=[a, {b: 1}]", "lora.r=8", "data.eval=null"
    )
    assert read.values["training"]["learning_rate"] == 2e-5
    assert read.values["training"]["inner"]["deep"] == ["a", {"b": 1}]
    assert read.values["lora"] == {"r": 8}
    assert read.values["data"] == {"eval": None}
    assert str(read.problem(("lora", "r"), "bad")) == "command line: lora.r: bad"
    assert str(read.problem(("lora",), "bad")) == "command line: lora: bad"
    assert str(read.problem(("training", "inner", "deep", "b"), "bad")) == "command line: training.inner.deep.b: bad"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("training", "'training' is not a setting: write section.key=value"),
        ("training..x=1", "is not a setting"),
        ("=1", "is not a setting"),
        ("training.learning_rate.x=1", "training.learning_rate is a value, not a section"),
        ("training.steps=[1", "command line: training.steps: this is not YAML"),
    ],
)
def test_overrides_that_are_none(document, word, message):
    with pytest.raises(SettingsError, match=message.replace("[", r"\[")):
        document(TEXT, word)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe is a mapping of sections"),
        ("- 1\n- 2\n", "a recipe is a mapping of sections"),
        ("a: 1\nb: [\n", r"recipe.yaml:3: this is not YAML"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", r"recipe.yaml:4: b.c: given twice, also on line 3"),
        ("a: &x [*x]\n", r"recipe.yaml:1: an alias contains itself"),
        ("a: !!python/object/apply:os.system ['true']\n", "only plain mappings and lists are read"),
        ("a: !!python/name:os.system ''\n", "this is not YAML"),
        ("{[1]: 2}\n", "keys must be plain words"),
        ("a: 2024-13-45\n", "recipe.yaml"),
        ("a: \x00\n", "this is not YAML"),
    ],
)
def test_what_is_no_recipe(document, text, message):
    with pytest.raises(SettingsError, match=message) as refused:
        document(text)
    assert "\n" not in str(refused.value) or "\x00" in text


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        read_document(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(SettingsError, match="is not UTF-8"):
        read_document(tmp_path / "latin.yaml")


SAID = {
    "training.lr": "say training.learning_rate", "training.epochs": "say training.num_train_epochs",
    "epochs": "say training.num_train_epochs", "training.batch-size": "say training.per_device_train_batch_size",
    "training.grad_accum": "say training.gradient_accumulation_steps", "training.warmup": "say training.warmup_steps",
    "lora.rank": "say lora.r", "training.rank": "say lora.r", "lora.alpha": "say lora.lora_alpha",
    "lora.dropout": "say lora.lora_dropout", "model.bf16": "say model.dtype", "model.name": "say model.path",
    "data.file": "say data.path", "output.path": "say output.folder", "path": "say model.path or data.path or output.folder",
    "defenses.ldifs": "say defenses.feature_distance", "defenses.kl.lambda": "say defenses.kl.weight",
    "defenses.kl.wieght": "did you mean weight", "defences": "say defenses", "training.learnig_rate": "did you mean learning_rate",
}  # fmt: skip


@pytest.mark.parametrize("key", SAID)
def test_what_other_tools_call_a_key(tiny_recipe, key):
    with pytest.raises(SettingsError) as refused:
        load_recipe(tiny_recipe, [f"{key}=1"])
    assert str(refused.value) == f"command line: {key}: unknown; {SAID[key]}"


@pytest.fixture
def tiny_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "model: {path: m}\ndata: {path: d}\noutput: {folder: o}\ndefenses: {kl: {weight: 0.1}}\n"
    )
    return tmp_path / "recipe.yaml"


def test_every_synonym_leads_to_a_key_that_there_is():
    known = {
        "model": {field.name for field in dataclasses.fields(ModelSection)},
        "data": DataSection.model_fields,
        "output": OutputSection.model_fields,
        "lora": dataclass_fields(LORA.package, LORA.name).keys(),
        "training": dataclass_fields(TRAINING.package, TRAINING.name).keys() | TRAINING.defaults.keys(),
        "defenses": registered().keys(),
        "": SECTIONS,
    }
    for key in SYNONYMS:
        section, _, name = key.rpartition(".")
        assert name in known[section], key


def test_what_another_package_refuses_names_every_place_that_may_be_meant(document):
    read = document(TEXT, "training.seed=3")
    assert str(read.blame("training", "the seed must be odd")) == "command line: training.seed: the seed must be odd"
    said = str(read.blame("training", "learning rate: too high"))
    assert said.endswith("recipe.yaml:4: training.learning_rate: learning rate: too high")
    assert str(read.blame("training", "no GPU")).endswith("recipe.yaml:3 or the command line: training: no GPU")
    assert str(document(TEXT).blame("training", "no GPU")).endswith("recipe.yaml:3: training: no GPU")
