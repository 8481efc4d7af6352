"""PEFT loads the projected tensors of an adapter, whatever the keys of the input were."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_models import save_pair, tiny_model, tiny_peft_model

from safelora_fast import project_adapter
from safelora_fast.checkpoints.adapter_keys import is_targeted
from safelora_fast.errors import AdapterError
from safelora_fast.projection.sweep import sweep_thresholds

WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."
LORA = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return checkpoints, an adapter as PEFT writes it, and the tensors of its projection."""
    folder = tmp_path_factory.mktemp("plain")
    pair = save_pair(folder, layers=2)
    model = tiny_peft_model(layers=2, lora=LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_embedding" in name or "modules_to_save" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(4))
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    project_adapter(folder / "adapter", **pair, output=folder / "truth", select="all")
    return pair, folder / "adapter", load_file(folder / "truth" / WEIGHTS)


def copy(adapter, folder, change, **config):
    """Copy the adapter with other keys and other settings."""
    shutil.copytree(adapter, folder)
    tensors = {change(key): tensor for key, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return folder


def loaded_by_peft(folder):
    model = PeftModel.from_pretrained(tiny_model(layers=2), folder)
    return get_peft_model_state_dict(model, save_embedding_layers=False)


CHANGES = {
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "no decoder": lambda key: key.replace(f"{PREFIX}model.", PREFIX),
    "neither": lambda key: key.removeprefix(f"{PREFIX}model."),
    "half a prefix": lambda key: key.replace(PREFIX, "base_model."),
    "twice": lambda key: PREFIX + key,
    "decoder twice": lambda key: key.replace(PREFIX, f"{PREFIX}model."),
    "no .weight": lambda key: key.removesuffix(".weight") if "lora_" in key else key,
    ".weight of embeddings": lambda key: f"{key}.weight" if "lora_embedding" in key else key,
    "adapter's name": lambda key: key.replace("_A.weight", "_A.other.weight").replace("_B.weight", "_B.other.weight"),
    "adapter's name of embeddings": lambda key: f"{key}.other" if "lora_embedding" in key else key,
    "adapter's name of a whole module": lambda key: key.replace("norm.weight", "norm.modules_to_save.other.weight"),
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace(f"{PREFIX}model.", f"{PREFIX}_orig_mod.model."),
    "FSDP": lambda key: key.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "DDP": lambda key: f"module.{key}",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("settings", [{"select": "all"}, {"select": "number", "num_layers": 1}], ids=str)
def test_keys_that_peft_would_not_read_are_mended(plain, tmp_path, change, settings):
    pair, adapter, _ = plain
    project_adapter(adapter, **pair, output=tmp_path / "truth", **settings)
    other = copy(adapter, tmp_path / "other", change)
    report = project_adapter(other, **pair, output=tmp_path / "out", **settings)
    assert any("of its file are not those that PEFT reads" in warning for warning in report.warnings)
    truth, loaded = load_file(tmp_path / "truth" / WEIGHTS), loaded_by_peft(tmp_path / "out")
    assert truth.keys() == loaded.keys()
    assert all(torch.equal(tensor, truth[key]) for key, tensor in loaded.items())


def test_right_keys_are_kept_without_a_word(plain, tmp_path):
    pair, adapter, truth = plain
    report = project_adapter(adapter, **pair, output=tmp_path / "out", select="all")
    assert not any("key" in warning for warning in report.warnings)
    assert (tmp_path / "out" / WEIGHTS).stat().st_size == (adapter / WEIGHTS).stat().st_size
    loaded = loaded_by_peft(tmp_path / "out")
    assert all(torch.equal(loaded[key], tensor) for key, tensor in truth.items())


def test_a_sweep_mends_as_a_projection_does(plain, tmp_path):
    pair, adapter, truth = plain
    other = copy(adapter, tmp_path / "other", CHANGES["neither"])
    (swept,) = sweep_thresholds(other, **pair, thresholds=[1.0], output=tmp_path / "out")
    loaded = loaded_by_peft(swept.folder)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in truth.items())


def test_names_of_two_adapters_are_refused(plain, tmp_path):
    pair, adapter, _ = plain
    other = copy(adapter, tmp_path / "other", lambda key: key.replace("_A.w", "_A.one.w").replace("_B.w", "_B.two.w"))
    with pytest.raises(AdapterError, match=r"names of several adapters \(one, two\)"):
        project_adapter(other, **pair, output=tmp_path / "out")


def test_keys_that_become_one_are_refused(plain, tmp_path):
    pair, adapter, _ = plain
    tensors = load_file(adapter / WEIGHTS)
    other = copy(adapter, tmp_path / "other", str)
    save_file(tensors | {key.removeprefix(PREFIX): tensor.clone() for key, tensor in tensors.items()}, other / WEIGHTS)
    with pytest.raises(AdapterError, match="are both"):
        project_adapter(other, **pair, output=tmp_path / "out")


def test_modules_of_another_class_keep_their_keys_and_are_named(plain, tmp_path):
    pair, adapter, truth = plain
    other = copy(adapter, tmp_path / "other", lambda key: key.replace("model.layers.", "model.language_model.layers."))
    report = project_adapter(other, **pair, output=tmp_path / "out", select="all")
    assert any("named as in another class" in warning for warning in report.warnings)
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert written.keys() == load_file(other / WEIGHTS).keys()
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert torch.equal(written[key.replace("model.layers.", "model.language_model.layers.")], truth[key])


def test_a_backbone_without_a_task_keeps_its_keys(plain, tmp_path):
    """PEFT writes such keys for a model without a head."""
    pair, adapter, _ = plain
    other = copy(adapter, tmp_path / "other", CHANGES["no decoder"], task_type="FEATURE_EXTRACTION")
    project_adapter(other, **pair, output=tmp_path / "out", select="all")
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == load_file(other / WEIGHTS).keys()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": r".*layers\.1\.self_attn\.q_proj|.*embed_tokens"},
        {"exclude_modules": ["q_proj"]},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
    ],
    ids=str,
)
def test_factors_that_peft_leaves_out_are_named(plain, tmp_path, config):
    pair, adapter, _ = plain
    report = project_adapter(copy(adapter, tmp_path / "other", str, **config), **pair, output=None)
    (warning,) = [warning for warning in report.warnings if "PEFT leaves these factors out" in warning]
    peft = PeftModel.from_pretrained(tiny_model(layers=2), tmp_path / "other")
    names = ["model.embed_tokens", *(f"model.layers.{layer}.self_attn.q_proj" for layer in range(2))]
    adapted = {name for name in names if hasattr(peft.get_base_model().get_submodule(name), "lora_A")}
    settings = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    assert adapted == {name for name in names if is_targeted(name, settings)}
    assert any(name in warning for name in set(names) - adapted)
