"""Projection in a loaded PeftModel: it adds a new adapter and changes nothing else."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, adapt, save
from peft import PeftModel
from safetensors.torch import load_file

from safelora_fast import project_adapter, project_peft_model
from safelora_fast.errors import AdapterError, BackendError, CheckpointError, SettingsError


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder, family = tmp_path_factory.mktemp("llama"), FAMILIES["llama"]
    return {"aligned": save(family.make(1), folder / "aligned"), "base": save(family.make(2), folder / "base")}


@pytest.fixture
def model():
    return adapt(FAMILIES["llama"].make(1), **FAMILIES["llama"].target)


def lora(model, name):
    return {
        key.replace(f".{name}.", "."): value.detach().clone()
        for key, value in model.named_parameters()
        if "lora_" in key and f".{name}." in key
    }


def test_equals_the_projection_from_disk(model, sources, tmp_path):
    adapter = save(model, tmp_path / "adapter")
    ids = torch.arange(8).reshape(1, 8) + 3
    model.eval()
    with torch.no_grad():
        before = model(ids).logits
    report = project_peft_model(model, **sources, select="all")
    project_adapter(adapter, **sources, output=tmp_path / "out", select="all")
    expected = load_file(tmp_path / "out" / "adapter_model.safetensors")
    found = lora(model, "safe")
    assert {key.removeprefix("base_model.model.") for key in expected} == {
        key.removeprefix("base_model.model.") for key in found
    }
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(module.projected for module in report.adapters[0].modules)
    assert report.adapters[0].output is None
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
        model.set_adapter("safe")
        loaded = PeftModel.from_pretrained(FAMILIES["llama"].make(1), tmp_path / "out").eval()
        torch.testing.assert_close(model(ids).logits, loaded(ids).logits, rtol=0, atol=0)


def test_the_rest_is_left_alone(model, sources):
    model.train()
    original = {name: value.detach().clone() for name, value in model.named_parameters()}
    trained = {name: value.requires_grad for name, value in model.named_parameters()}
    project_peft_model(model, **sources, operator="zero", select="all")
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in original.items())
    assert {name: after[name].requires_grad for name in trained} == trained
    assert not any(value.requires_grad for name, value in after.items() if ".safe." in name)
    assert model.active_adapters == ["default"]
    assert model.training


def test_another_adapter_and_another_name(model, sources):
    model.add_adapter("narrow", adapt(FAMILIES["llama"].make(1), r=3, target_modules=["v_proj"]).peft_config["default"])
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".narrow." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    project_peft_model(
        model, **sources, adapter_name="narrow", new_adapter_name="narrow-safe", operator="zero", select="all"
    )
    found = lora(model, "narrow-safe")
    assert len(found) == 4
    assert all(not value.any() for key, value in found.items() if "lora_B" in key)
    assert all(torch.equal(value, lora(model, "narrow")[key]) for key, value in found.items() if "lora_A" in key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_of_the_original(model, sources, dtype):
    model.to(dtype)
    project_peft_model(model, **sources, select="all")
    assert {value.dtype for value in lora(model, "safe").values()} == {dtype}


SIX = {"select": "number", "num_layers": 6}


@pytest.mark.parametrize("settings", [SIX, {**SIX, "operator": "zero"}, {**SIX, "normalize": "spectral"}], ids=str)
def test_on_a_device_with_the_weights_that_the_model_has(model, sources, settings):
    """With the CPU as the device, weights in the model are not read from files."""
    expected = project_peft_model(model, **sources, new_adapter_name="extension", **settings)
    report = project_peft_model(model, **sources, new_adapter_name="device", device="cpu", **settings)
    assert 2 * report.bytes_read == expected.bytes_read
    for ours, theirs in zip(report.adapters[0].modules, expected.adapters[0].modules, strict=True):
        assert (ours.name, ours.projected, ours.reason) == (theirs.name, theirs.projected, theirs.reason)
        assert ours.cosine == pytest.approx(theirs.cosine, abs=1e-6)
        assert ours.gain == pytest.approx(theirs.gain, rel=1e-5)
    found = lora(model, "device")
    for key, tensor in lora(model, "extension").items():
        assert (found[key] - tensor).norm() <= 1e-5 * tensor.norm()
    assert any(not torch.equal(found[key], tensor) for key, tensor in lora(model, "default").items())


def test_a_model_whose_weights_are_not_the_aligned_ones_is_no_source(model, sources):
    """If the model's weights have another dtype or were trained further, V still comes from the checkpoints."""
    expected = project_peft_model(model, **sources, new_adapter_name="extension", select="all")
    module = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    with torch.no_grad():
        module.base_layer.weight += 1e-3
    report = project_peft_model(model, **sources, new_adapter_name="trained", device="cpu", select="all")
    assert report.bytes_read == expected.bytes_read // 2 + module.base_layer.weight.nbytes
    model.base_model.model.to(torch.bfloat16)
    lower = project_peft_model(model, **sources, new_adapter_name="lower", device="cpu", select="all")
    assert lower.bytes_read == expected.bytes_read
    for ours, theirs in zip(report.adapters[0].modules, expected.adapters[0].modules, strict=True):
        assert ours.v_norm == pytest.approx(theirs.v_norm, rel=1e-6)
        assert ours.cosine == pytest.approx(theirs.cosine, abs=1e-6)


def test_a_merged_adapter_is_refused(model, sources):
    model.merge_adapter()
    with pytest.raises(SettingsError, match="merged into the model's weights"):
        project_peft_model(model, **sources)
    assert all(module.merged for module in model.modules() if hasattr(module, "lora_A"))


REFUSED = [
    ({"adapter_name": "other"}, "no adapter 'other'; it has 'default'"),
    ({"adapter_name": ["default"]}, r"no adapter \['default'\]"),
    ({"new_adapter_name": "default"}, "has an adapter 'default' already"),
    *(({"new_adapter_name": name}, "cannot name an adapter") for name in ("safe.v2", "", "keys", None, ["safe"])),
    ({"output": "x"}, "output cannot be set here"),
    ({"threshold": 3.0}, "threshold"),
    ({"device": "tpu"}, "device must be one of cpu, cuda, xpu"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_errors_leave_the_model_as_it_was(model, sources, options, message):
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(SettingsError, match=message):
        project_peft_model(model, **sources, **options)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.peft_config) == ["default"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(model, sources):
    with pytest.raises(BackendError, match="device 'cuda' cannot be used"):
        project_peft_model(model, **sources, device="cuda")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("model", [None, torch.nn.Linear(2, 2), "adapter"])
def test_what_is_no_peft_model(model):
    with pytest.raises(SettingsError, match=f"model must be a PeftModel.*not {type(model).__name__}"):
        project_peft_model(model, aligned="a", base="b")


@pytest.mark.parametrize("name", ["default", "narrow"])
def test_a_refusal_names_the_adapter_instead_of_a_temporary_folder(sources, name):
    family = FAMILIES["llama"]
    model = adapt(family.make(1), name=name, use_dora=True, **family.target)
    with pytest.raises(AdapterError) as refused:
        project_peft_model(model, **sources, adapter_name=name)
    assert str(refused.value).startswith(f"adapter '{name}': use_dora is set")


def test_a_factor_that_is_not_finite_is_named_by_adapter_and_tensor(model, sources):
    tensor = "model.layers.0.mlp.down_proj.lora_A.default.weight"
    dict(model.named_parameters())[f"base_model.model.{tensor}"].data[0, 0] = torch.nan
    with pytest.raises(CheckpointError) as refused:
        project_peft_model(model, **sources)
    assert str(refused.value).startswith("adapter 'default': ")
    assert "layers.0.mlp.down_proj.lora_A" in str(refused.value)
