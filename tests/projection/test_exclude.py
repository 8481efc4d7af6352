"""Excluding modules of an adapter by name or pattern."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from families import FAMILIES, adapt, save
from plain_pair import contents, module_names, run, write_pair
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from torch import nn

from safelora_fast import project_adapter
from safelora_fast.checkpoints.tensor_names import matching
from safelora_fast.defenses import SafeLora, SubspacePenalty
from safelora_fast.defenses.base import Run
from safelora_fast.defenses.parts.safe_modules import SafeModules
from safelora_fast.errors import AdapterError, PairingError, SettingsError
from safelora_fast.projection.peft_model import project_peft_model
from safelora_fast.subspace.safe_subspace import SafeSubspace

WEIGHTS = "adapter_model.safetensors"
HEAD = "base_model.model.lm_head.lora_B.weight"


@pytest.fixture
def odd(tmp_path):
    """A pair whose adapter also adapts the head, which has another number of rows in the base model."""
    pair = write_pair(tmp_path)
    random = np.random.default_rng(4)
    for role, rows in (("aligned", 12), ("base", 10)):
        index = json.loads((getattr(pair, role) / "model.safetensors.index.json").read_text())
        tensors = load_file(pair.shard(role)) | {"lm_head.weight": random.standard_normal((rows, 16), dtype=np.float32)}
        save_file(tensors, pair.shard(role), {"format": "pt"})
        index["weight_map"]["lm_head.weight"] = pair.shard(role).name
        (getattr(pair, role) / "model.safetensors.index.json").write_text(json.dumps(index))
    plain = load_file(pair.adapter / WEIGHTS)
    head = {
        HEAD: random.standard_normal((12, 4), dtype=np.float32),
        HEAD.replace("lora_B", "lora_A"): random.standard_normal((4, 16), dtype=np.float32),
    }
    save_file(plain | head, pair.adapter / WEIGHTS, {"format": "pt"})
    return pair, plain, head


@pytest.mark.parametrize("exclude", ["lm_head", ["lm_*"], ("*head",)])
def test_the_others_are_projected_as_ever(odd, tmp_path, exclude):
    pair, plain, head = odd
    models = {"aligned": pair.aligned, "base": pair.base, "select": "all"}
    report = project_adapter(pair.adapter, **models, output=tmp_path / "left", exclude=exclude)
    save_file(plain, pair.adapter / WEIGHTS, {"format": "pt"})
    project_adapter(pair.adapter, **models, output=tmp_path / "without")
    left, without = (load_file(tmp_path / name / WEIGHTS) for name in ("left", "without"))
    assert left.keys() == {**plain, **head}.keys()
    assert all(np.array_equal(left[key], without[key] if key in without else head[key]) for key in left)
    (adapter,) = report.adapters
    assert adapter.excluded == ["lm_head"]
    assert {entry["tensor"] for entry in adapter.copied} == set(head)
    assert any("1 module excluded as asked, not projected: lm_head" in w for w in report.warnings)
    stored = json.loads((tmp_path / "left" / "safelora_report.json").read_text())
    assert stored["adapters"][0]["excluded"] == ["lm_head"]
    assert stored["settings"]["exclude"] == ([exclude] if isinstance(exclude, str) else list(exclude))
    assert "## Excluded" in (tmp_path / "left" / "README.md").read_text()


def test_factors_that_are_excluded_do_not_count_as_trained_beside_them(odd):
    pair, _, _ = odd
    models = {"aligned": pair.aligned, "base": pair.base, "output": pair.output}
    report = project_adapter(pair.adapter, **models, exclude="lm_head", strict=True)
    assert not any("trained beside the LoRA factors" in warning for warning in report.warnings)


def test_the_refusal_names_the_option(odd):
    pair, _, _ = odd
    before = contents(pair.output.parent) if pair.output.parent.exists() else {}
    with pytest.raises(
        PairingError,
        match=r"lm_head: the vocabulary was resized.*; to project the others: --exclude lm_head .in Python.*lm_head",
    ):
        project_adapter(pair.adapter, aligned=pair.aligned, base=pair.base, output=pair.output)
    assert (contents(pair.output.parent) if pair.output.parent.exists() else {}) == before


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        (["layers.1.mlp.down_proj"], "--exclude model.layers.1.mlp.down_proj"),
        (["layers.1.s"], "--exclude model.layers.1.self_attn.q_proj --exclude model.layers.1.self_attn.v_proj"),
        (["layers.1.", "layers.2."], "--exclude model.layers.1.* --exclude model.layers.2.*"),
        (["q_proj"], "--exclude q_proj"),
    ],
)
def test_what_is_offered_excludes_what_does_not_pair(tmp_path, lacking, words):
    """If the base lacks modules, such as some layers, the suggested exclusions work."""
    pair = write_pair(tmp_path, layers=5)
    index = json.loads((pair.base / "model.safetensors.index.json").read_text())
    places = index["weight_map"]
    index["weight_map"] = {name: places[name] for name in places if not any(part in name for part in lacking)}
    (pair.base / "model.safetensors.index.json").write_text(json.dumps(index))
    models = {"aligned": pair.aligned, "base": pair.base, "output": pair.output}
    with pytest.raises(PairingError) as refused:
        project_adapter(pair.adapter, **models)
    patterns = words.split()[1::2]
    assert str(refused.value).endswith(f"; to project the others: {words} (in Python, exclude={patterns})")
    report = project_adapter(pair.adapter, **models, exclude=patterns)
    assert not any(part in module.name for part in lacking for module in report.adapters[0].modules)


def test_a_wrong_model_is_not_offered_to_be_excluded(tmp_path):
    pair = write_pair(tmp_path)
    for path in pair.base.iterdir():
        path.unlink()
    save_file({"other.weight": np.ones((2, 2), np.float32)}, pair.base / "model.safetensors")
    with pytest.raises(PairingError) as refused:
        project_adapter(pair.adapter, aligned=pair.aligned, base=pair.base, output=pair.output)
    assert "--exclude" not in str(refused.value)


def test_the_command(odd):
    pair, _, _ = odd
    code, _, err = run(pair.command("--exclude", "lm_head", "--exclude", "layers.1.*", "--select", "all"))
    assert code == 0
    assert "4 modules excluded as asked" in " ".join(err.split())
    stored = json.loads((pair.output / "safelora_report.json").read_text())["adapters"][0]
    assert {module["name"] for module in stored["modules"]} == set(module_names(1))
    code, _, err = run(
        ["inspect", pair.adapter, "--aligned", pair.aligned, "--base", pair.base, "--exclude", "lm_head"]
    )
    assert code == 0


@pytest.mark.parametrize(
    ("exclude", "error", "match"),
    [
        (
            "score",
            SettingsError,
            r"exclude: no adapted module is called 'score'; they end in down_proj, lm_head, q_proj, v_proj",
        ),
        (["lm_head", "roj"], SettingsError, r"no adapted module is called 'roj'"),
        ("*", AdapterError, r"'\*' excludes every module: there is nothing to project"),
        ([""], SettingsError, "exclude must be names or patterns of modules"),
        (3, SettingsError, "exclude must be names or patterns of modules"),
    ],
)
def test_patterns_that_cannot_be_meant(odd, exclude, error, match):
    pair, _, _ = odd
    with pytest.raises(error, match=match):
        project_adapter(pair.adapter, aligned=pair.aligned, base=pair.base, output=pair.output, exclude=exclude)
    assert not pair.output.exists()


def test_a_convolution(tmp_path):
    """The factors have four axes, so they cannot be paired."""
    pair = write_pair(tmp_path)
    plain = load_file(pair.adapter / WEIGHTS)
    more = {f"base_model.model.conv.lora_{side}.weight": np.ones((4, 4, 1, 1), np.float32) for side in ("A", "B")}
    save_file(plain | more, pair.adapter / WEIGHTS, {"format": "pt"})
    models = {"aligned": pair.aligned, "base": pair.base, "output": pair.output}
    with pytest.raises(AdapterError, match=r"of a convolution.*--exclude conv"):
        project_adapter(pair.adapter, **models)
    report = project_adapter(pair.adapter, **models, exclude="conv")
    assert report.adapters[0].excluded == ["conv"]
    assert load_file(pair.output / WEIGHTS).keys() == {**plain, **more}.keys()


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("layers.0.*", ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"]),
        ("model.layers.1.self_attn.q_proj", ["model.layers.1.self_attn.q_proj"]),
        ("layers.[01].mlp.*", ["model.layers.0.mlp.up_proj"]),
        ("head", []),
        ("lm_head", ["lm_head"]),
    ],
)
def test_what_a_pattern_matches(pattern, names):
    known = ["lm_head", "model.layers.0.mlp.up_proj"]
    known += [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    assert sorted(name for name in known if matching(name, [pattern])) == sorted(names)


def llama(tmp_path):
    family = FAMILIES["llama"]
    folders = save(family.make(1), tmp_path / "aligned"), save(family.make(2, vocab_size=44), tmp_path / "base")
    return folders, adapt(family.make(1), target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")


@pytest.mark.filterwarnings("ignore")
def test_in_a_loaded_model(tmp_path):
    (aligned, base), adapted = llama(tmp_path)
    head = adapted.base_model.model.lm_head.lora_B["default"].weight.detach().clone()
    with pytest.raises(PairingError, match="lm_head"):
        project_peft_model(adapted, aligned=aligned, base=base, select="all")
    report = project_peft_model(adapted, aligned=aligned, base=base, select="all", exclude=["lm_head"])
    assert torch.equal(adapted.base_model.model.lm_head.lora_B["safe"].weight, head)
    query = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert not torch.equal(query.lora_B["safe"].weight, query.lora_B["default"].weight)
    assert report.adapters[0].excluded == ["lm_head"]


@pytest.mark.filterwarnings("ignore")
def test_at_the_end_of_training(tmp_path):
    (aligned, base), adapted = llama(tmp_path)
    sources = SafeSubspace.from_sources(aligned=aligned, base=base)
    with pytest.raises(PairingError, match=r"SafeLora: .*lm_head"):
        SafeLora(sources, select="all").attach(Run(adapted))
    adapted.save_pretrained(tmp_path / "adapter")
    project_adapter(
        tmp_path / "adapter", aligned=aligned, base=base, output=tmp_path / "out", select="all", exclude="lm_head"
    )
    report = SafeLora(sources, select="all", exclude=["lm_head"]).attach(Run(adapted)).finish()
    assert report.adapters[0].excluded == ["lm_head"]
    adapted.save_pretrained(tmp_path / "trained")
    ours, theirs = (load_torch(tmp_path / name / WEIGHTS) for name in ("trained", "out"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "defense", [lambda *a, **k: SafeLora(*a, at="step", **k), SubspacePenalty], ids=["step", "penalty"]
)
def test_on_a_subspace(tmp_path, defense):
    (aligned, base), adapted = llama(tmp_path)
    subspace = SafeSubspace.build(aligned=aligned, base=base, modules=["q_proj"], rank=2)
    inner: nn.Module = adapted.get_base_model()
    with pytest.raises(PairingError, match="lm_head is not in the subspace"):
        SafeModules(inner, subspace, owner="x", exclude=defense(subspace).exclude)
    modules = SafeModules(inner, subspace, owner="x", exclude=defense(subspace, exclude=["lm_head"]).exclude)
    assert [module.name for module in modules.modules] == [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]
    assert re.search(r"exclude=\['lm_head'\]", repr(SafeLora(subspace, at="step", exclude=["lm_head"])))


def test_building_a_subspace(odd):
    pair, _, _ = odd
    models = {"aligned": pair.aligned, "base": pair.base, "modules": ["q_proj", "lm_head"], "rank": 2}
    with pytest.raises(PairingError, match="; to project the others: --exclude lm_head"):
        SafeSubspace.build(**models)
    subspace = SafeSubspace.build(**models, exclude="lm_head")
    assert sorted(subspace.modules) == [name for name in module_names() if name.endswith("q_proj")]
    assert subspace.settings["exclude"] == ["lm_head"]
    with pytest.raises(SettingsError, match="none of the modules is called 'score'"):
        SafeSubspace.build(**models, exclude="score")
