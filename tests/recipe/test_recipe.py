"""Recipes as a whole: invalid settings, positions in error messages, and settings read from the defenses' classes."""

from __future__ import annotations

import inspect

import pytest
import yaml

import safelora_fast
from safelora_fast.configuration.defense_section import DefenseSpec, Subspaces
from safelora_fast.defenses import KL, SafeLora, SubspacePenalty, registered
from safelora_fast.errors import SettingsError
from safelora_fast.recipe.recipe import load_recipe
from safelora_fast.subspace.safe_subspace import SafeSubspace

TEXT = """\
model:
  path: somewhere
data:
  path: rows.jsonl
lora:
  r: 8
training:
  learning_rate: 2e-4
defenses:
  kl:
    weight: 0.2
output:
  folder: out
"""


@pytest.fixture
def load(tmp_path):
    def make(*overrides, text=TEXT):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(path, overrides)

    return make


def test_defaults_are_the_papers(load):
    recipe = load()
    assert recipe.training["learning_rate"] == 2e-4
    paper = {"num_train_epochs": 1, "warmup_steps": 5, "weight_decay": 0.01, "lr_scheduler_type": "linear"}
    assert paper.items() <= recipe.training.items()
    assert recipe.training["completion_only_loss"] is True
    assert recipe.lora["r"] == 8
    assert {"lora_alpha": 64, "use_rslora": True, "target_modules": "all-linear"}.items() <= recipe.lora.items()
    assert recipe.model.dtype == "bfloat16"


def test_the_resolved_recipe_is_a_recipe(load, tmp_path):
    resolved = load("training.seed=4").resolved()
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(resolved))
    assert load_recipe(path).resolved() == resolved


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.path=x", "command line: modle: unknown; did you mean model"),
        ("model=x", "command line: model: must be a section with settings of its own, not 'x'"),
        ("model={}", "command line: model.path: missing"),
        ("model.pth=x", "command line: model.pth: unknown; did you mean path"),
        ("model.dtype=float8", "command line: model.dtype: must be 'bfloat16', 'float16' or 'float32', not 'float8'"),
        ("model.path=''", "command line: model.path: is empty"),
        ("data.max_rows=0", "command line: data.max_rows: must be at least 1, not 0"),
        ("data.safe=safe.jsonl", "data.safe: must be a section with settings of its own, not 'safe.jsonl'"),
        ("data.safe={fraction: 0.1}", "command line: data.safe.path: missing"),
        ("data.safe={path: s, fracton: 0.1}", "command line: data.safe.fracton: unknown; did you mean fraction"),
        ("data.safe={path: s, fraction: 0}", "command line: data.safe.fraction: must be above 0, not 0"),
        ("data.safe={path: s, fraction: .inf}", "command line: data.safe.fraction: must be a finite number, not inf"),
        ("data.safe={path: s, fraction: much}", "command line: data.safe.fraction: must be a number, not 'much'"),
        ("data.safe={path: s, top: 0}", "command line: data.safe.top: must be at least 1, not 0"),
        ("data.safe={path: s, seed: -1}", "command line: data.safe.seed: must be at least 0, not -1"),
        ("data={path: r, inoculate: x, strings: text}", "command line: data.inoculate: a system prompt needs turns"),
        ("data.eval=1.5", "command line: data.eval: must be text or a share above 0 and below 1, not 1.5"),
        ("data.eval=true", "command line: data.eval: must be text or a number, not True"),
        ("lora.alpha=3", "command line: lora.alpha: unknown; say lora.lora_alpha"),
        ("lora.r=8.5", "command line: lora.r: must be a whole number, not 8.5"),
        ("lora.task_type=SEQ_CLS", "command line: lora.task_type: is set by the command; leave it out"),
        ("training.learning_rat=1e-4", "command line: training.learning_rat: unknown; did you mean learning_rate"),
        ("training.learning_rate=fast", "command line: training.learning_rate: must be a number, not 'fast'"),
        ("training.packing=1", "command line: training.packing: must be true or false, not 1"),
        ("training.gradient_checkpointing_kwargs=[1]", "command line: training.gradient_checkpointing_kwargs: must be a mapping"),
        ("training.eval_strategy=1.5", "command line: training.eval_strategy: there is nothing to evaluate on"),
        ("lora.target_modules=[1]", "command line: lora.target_modules: must be text, not 1"),
        ("training.output_dir=x", "command line: training.output_dir: output.folder says it"),
        ("training.max_length=0", "command line: training.max_length: must be at least 1, not 0"),
        ("training.num_train_epochs=0", "command line: training.num_train_epochs: must be above 0, not 0"),
        ("training.max_steps=0", "command line: training.max_steps: is 0: nothing would be trained"),
        ("training.eval_strategy=steps", "command line: training.eval_strategy: there is nothing to evaluate on"),
        ("training={bf16: true, fp16: true}", "command line: training.fp16: bf16 is on too; choose one"),
        ("training={learning_rate: -1.0}", "command line: training.learning_rate: must be at least 0, not -1.0"),
        ("training={packing: true, max_length: null}", "command line: training.packing: needs training.max_length"),
        ("defenses.klm={}", "command line: defenses.klm: unknown; did you mean kl"),
        ("defenses.kl=0.1", "command line: defenses.kl: must be a mapping of settings, true or false, not 0.1"),
        ("defenses.kl.wieght=1", "command line: defenses.kl.wieght: unknown; did you mean weight"),
        ("defenses.kl.weight=-1", "command line: defenses.kl.weight: KL: weight is -1.0, it must be a number"),
        ("defenses.kl.tokens=some", 'defenses.kl.tokens: KL: tokens is \'some\', it must be "all", "completion" or "safe"'),
        ("defenses.kl.direction=up", "command line: defenses.kl.direction: must be 'reverse' or 'forward', not 'up'"),
        ("defenses.steering.layer=3", "command line: defenses.steering.vector: missing"),
        ("defenses.steering={vector: absent.pt, layer: 3}", "defenses.steering.vector: there is no file absent.pt"),
        ("defenses.steering={vector: [a], layer: 3}", "defenses.steering.vector: must be a number, not 'a'"),
        ("defenses.subspace_penalty.weight=1", "command line: defenses.subspace_penalty.subspace: missing"),
        ("defenses.safelora.subspace=absent", "defenses.safelora.subspace: there is no file absent; make it with"),
        ("defenses.safelora.subspace=3", "subspace: must be text or a section with settings of its own, not 3"),
        ("defenses.safelora.subspace={aligned: a}", "command line: defenses.safelora.subspace.base: missing"),
        ("defenses.safelora.subspace={aligned: a, bse: b}", "defenses.safelora.subspace.bse: unknown; did you mean base"),
        ("defenses.safelora={subspace: {aligned: a, base: b, rank: 4}}", "safelora.subspace.rank: a projection at the end"),
        ("defenses.safelora={subspace: {aligned: a, base: b}, at: step, operator: zero}", "shrinks B each time"),
        ("defenses.safelora={subspace: {aligned: a, base: b, device: cuda}}", "subspace.device: a projection at the end"),
        ("defenses.subspace_penalty.subspace={aligned: a, base: b, device: 3}", "subspace.device: must be text, not 3"),
        ("monitors.drift=0.1", "command line: monitors.drift: must be a mapping of settings (vector, layer), not 0.1"),
        ("monitors.drift={vector: [1.0]}", "command line: monitors.drift.layer: missing"),
        ("monitors.drift={vector: absent.pt, layer: 3}", "monitors.drift.vector: there is no file absent.pt"),
        ("monitors.drift={vector: [1.0], layer: 3, name: a}", "command line: monitors.drift.name: unknown; known are vector"),
        ("defenses.on_nonfinite=stop", "command line: defenses.on_nonfinite: must be raise or skip, not 'stop'"),
        ("defenses.reference=adapter", "command line: defenses.reference: must be base or cache:FOLDER, not 'adapter'"),
        ("defenses.reference='cache: '", "command line: defenses.reference: must be base or cache:FOLDER, not 'cache: '"),
    ],
)  # fmt: skip
def test_refusals(load, override, message):
    with pytest.raises(SettingsError) as refused:
        load(override)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_refusals_name_the_line(load):
    with pytest.raises(
        SettingsError, match=r"recipe\.yaml:8: training\.learning_rat: unknown; did you mean learning_rate"
    ):
        load(text=TEXT.replace("learning_rate", "learning_rat"))
    with pytest.raises(SettingsError, match=r"recipe\.yaml:11: defenses\.kl\.weight: KL: weight is -0\.2"):
        load(text=TEXT.replace("0.2", "-0.2"))
    with pytest.raises(SettingsError, match=r"recipe\.yaml: output\.folder: missing"):
        load(text=TEXT.partition("output")[0])


@pytest.mark.parametrize(("value", "weights"), [("null", [0.1]), ("true", [0.1]), ("{}", [0.1]), ("false", [])])
def test_a_defense_by_its_name_alone(load, value, weights):
    assert [spec.settings["weight"] for spec in load(f"defenses.kl={value}").defenses] == weights


def test_every_defense_can_be_given_and_has_an_estimate():
    known = registered()
    assert list(known) == ["feature_distance", "kl", "safelora", "steering", "subspace_penalty", "template_anchor"]
    assert all("cost" in vars(kind) and getattr(safelora_fast, kind.__name__) is kind for kind in known.values())


def test_settings_are_the_constructors(load):
    (spec,) = load("defenses.kl.temperature=2").defenses
    built = spec.build(Subspaces(build=True))
    assert isinstance(built, KL)
    assert (built.weight, built.direction, built.tokens, built.temperature) == (0.2, "reverse", "all", 2.0)
    assert set(spec.settings) == set(inspect.signature(KL).parameters)


def test_one_subspace_for_all_that_name_it(monkeypatch):
    made = []

    def build(**arguments):
        made.append(arguments)
        return SafeSubspace({})

    monkeypatch.setattr("safelora_fast.configuration.defense_section.SafeSubspace.build", build)
    source = {"aligned": "a", "base": "b", "rank": 3, "device": "cuda"}
    subspaces = Subspaces(build=True)
    step = DefenseSpec(SafeLora, {"subspace": source, "at": "step"}).build(subspaces)
    penalty = DefenseSpec(SubspacePenalty, {"subspace": dict(source), "weight": 1.0}).build(subspaces)
    assert step.subspace is penalty.subspace
    assert made == [{**source, "progress": False}]  # no separate progress bar
