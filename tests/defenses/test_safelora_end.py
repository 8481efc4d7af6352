"""SafeLora(at="end"): the adapter in the model is byte for byte what `project_adapter` makes of the saved adapter."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import EXPERTS, FAMILIES, adapt, save
from peft import inject_adapter_in_model
from plain_loop import train_windows
from safetensors.torch import load_file, save_file
from tiny_models import (
    adapter_weights,
    collate,
    fill_adapter,
    furthest,
    random_subspace,
    rows,
    save_pair,
    tiny_model,
    tiny_peft_model,
)
from train_runs import sgd

from safelora_fast import project_adapter
from safelora_fast.defenses import KL, SafeLora
from safelora_fast.errors import AdapterError, CheckpointError, PairingError, SettingsError
from safelora_fast.projection.peft_model import lora_parameters
from safelora_fast.subspace.module_subspace import ModuleSubspace
from safelora_fast.subspace.safe_subspace import SafeSubspace
from safelora_fast.training import defend

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type.*Experts:UserWarning"),  # PEFT 0.18
]
OPERATORS = {
    "safelora": {"select": "all"},
    "spectral": {"normalize": "spectral", "threshold": 0.9},
    "orthogonal": {"operator": "orthogonal", "rank": 3, "select": "number", "num_layers": 5},
    "zero": {"operator": "zero", "threshold": 0.7},
    "attenuate": {"operator": "attenuate", "rank": 3, "keep": 0.2, "select": "number", "num_layers": 5},
}


@pytest.fixture
def sources(tmp_path):
    return save_pair(tmp_path)


def from_disk(model, sources, folder, name="default", **options):
    """Save the adapter and project it on disk; return the report and the projected tensors."""
    model.save_pretrained(folder / "saved", selected_adapters=[name])
    saved = folder / "saved" if name == "default" else folder / "saved" / name
    report = project_adapter(saved, **sources, output=folder / "projected", **options)
    return report, load_file(folder / "projected" / "adapter_model.safetensors")


def same_bytes(model, expected, name="default"):
    found, _ = lora_parameters(model, name)
    assert found.keys() == {key for key in expected if ".lora_" in key}
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype
        assert tensor.detach().contiguous().view(torch.uint8).equal(expected[key].view(torch.uint8)), key


@pytest.mark.parametrize("options", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_projection_of_the_saved_adapter(sources, tmp_path, options, dtype):
    model = tiny_peft_model()
    model.to(dtype)
    report, expected = from_disk(model, sources, tmp_path, **options)
    before = adapter_weights(model)
    assert report.adapters[0].projected
    with defend(model, [SafeLora(SafeSubspace.from_sources(**sources), **options)]) as defended:
        assert furthest(before, adapter_weights(model)) == 0
    same_bytes(model, expected)
    found = defended.projection_report
    assert found.adapters[0].modules == report.adapters[0].modules
    assert (found.adapters[0].adapter, found.adapters[0].output) == ("default", None)
    metrics = defended.metrics()
    cosines = [module.cosine for module in report.adapters[0].modules]
    assert metrics["defense/cosine_min"] == min(cosines)
    assert metrics["defense/modules_projected"] == len(report.adapters[0].projected)


def test_a_merge_at_the_end(sources, tmp_path):
    """The safe adapter is the model's own with the sign turned, so the merge is 0.6 of the update."""
    model = tiny_peft_model()
    model.save_pretrained(tmp_path / "safe")
    path = tmp_path / "safe" / "adapter_model.safetensors"
    turned = {key: -tensor if ".lora_B." in key else tensor for key, tensor in load_file(path).items()}
    save_file(turned, path, {"format": "pt"})
    options = {"operator": "merge", "weight": 0.8, "safe_adapter": str(tmp_path / "safe"), "select": "all"}
    report, expected = from_disk(model, sources, tmp_path, **options)
    assert [module.gain for module in report.adapters[0].modules] == pytest.approx(
        [0.6] * len(report.adapters[0].modules)
    )
    with defend(model, [SafeLora(SafeSubspace.from_sources(**sources), **options)]):
        pass
    same_bytes(model, expected)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "mixtral", "gpt_oss"])
def test_families(tmp_path, family):
    made = FAMILIES[family]
    folders = {role: save(made.make(seed), tmp_path / role) for role, seed in (("aligned", 1), ("base", 2))}
    model = adapt(made.make(1), **made.target)
    report, expected = from_disk(model, folders, tmp_path, select="all")
    with defend(model, [SafeLora(SafeSubspace.build(**folders, rank=2), select="all")]) as defended:
        pass
    same_bytes(model, expected)
    names = [module.name for module in defended.projection_report.adapters[0].modules]
    assert names == [module.name for module in report.adapters[0].modules]
    assert any(".experts." in name for name in names) == (made.experts == EXPERTS)


def test_sources_alone_do_not_serve_a_step(sources):
    subspace = SafeSubspace.from_sources(**sources)
    model = tiny_peft_model()
    with pytest.raises(PairingError, match=r"only names its sources.*SafeSubspace\.build"):
        defend(model, [SafeLora(subspace, at="step")], optimizer=torch.optim.SGD(model.parameters(), 0.1))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT 0.18, of every Llama
def test_another_adapter_beside_what_is_trained_in_full(sources, tmp_path):
    model = tiny_peft_model()
    config = model.peft_config["default"]
    model.add_adapter("narrow", type(config)(r=3, target_modules=["v_proj"], modules_to_save=["lm_head"]))
    model.set_adapter("narrow")
    fill_adapter(model, seed=3, adapter="narrow")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, expected = from_disk(model, sources, tmp_path, "narrow", select="all")
    with defend(model, [SafeLora(SafeSubspace.from_sources(**sources), select="all")]) as defended:
        pass
    same_bytes(model, expected, "narrow")
    (adapter,) = defended.projection_report.adapters
    assert adapter.adapter == "narrow"
    assert ["lm_head" in copied["tensor"] for copied in adapter.copied] == [True]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (".lora_B.narrow." not in name)


def test_an_adapter_that_the_model_itself_holds(sources, tmp_path):
    """PEFT layers inside the model without a PeftModel around it, as with `add_adapter` of transformers."""
    wrapped, model = tiny_peft_model(), tiny_model()
    _, expected = from_disk(wrapped, sources, tmp_path, select="all")
    inject_adapter_in_model(wrapped.peft_config["default"], model, "narrow")
    fill_adapter(model, seed=1, adapter="narrow")
    with defend(model, [SafeLora(SafeSubspace.from_sources(**sources), select="all")]):
        pass
    same_bytes(model, {key.removeprefix("base_model.model."): tensor for key, tensor in expected.items()}, "narrow")


def test_once_and_only_when_the_context_ends_well(sources):
    defenses = [SafeLora(SafeSubspace.from_sources(**sources), select="all")]
    model = tiny_peft_model()
    before = adapter_weights(model)
    with pytest.raises(RuntimeError, match="stop"), defend(model, defenses) as defended:
        raise RuntimeError("stop")
    assert defended.projection_report is None
    assert furthest(before, adapter_weights(model)) == 0
    with defend(model, defenses) as defended:
        report = defended.finish()
        once = adapter_weights(model)
        assert furthest(before, once) > 1e-3
        assert defended.finish() is report
    assert furthest(once, adapter_weights(model)) == 0
    assert defended.projection_report is report
    with defend(model, []) as defended:
        assert defended.finish() is None


def test_what_the_report_warns_of_is_logged(sources, caplog):
    """A projection that nearly deletes the fine-tuning must be logged: C scales with ‖V‖."""
    weights = load_file(sources["aligned"] / "model.safetensors")
    save_file({name: 1.0001 * weight for name, weight in weights.items()}, sources["base"] / "model.safetensors")
    with defend(tiny_peft_model(), [SafeLora(SafeSubspace.from_sources(**sources), select="all")]):
        pass
    assert "SafeLora: default: the median gain" in caplog.text
    assert "nearly deletes" in caplog.text
    caplog.clear()
    with defend(tiny_peft_model(), [SafeLora(SafeSubspace.from_sources(**sources), threshold=-1.0)]):
        pass
    assert "SafeLora: default: no module was selected" in caplog.text


def test_beside_other_defenses(sources, tmp_path):
    """Training runs as without SafeLora, and the projection follows."""
    windows, models = [[collate(rows([7, 3, 5]))]] * 2, [tiny_peft_model(), tiny_peft_model()]
    at_end = SafeLora(SafeSubspace.from_sources(**sources), threshold=0.8)
    for model, beside in zip(models, ([], [at_end]), strict=True):
        _, metrics = train_windows(windows, [KL(3.0), *beside], model=model)
        assert metrics.keys() >= {"defense/kl", "defense/time_share"}
    _, expected = from_disk(models[0], sources, tmp_path, threshold=0.8)
    same_bytes(models[1], expected)


def test_orthogonal_takes_what_the_subspace_was_built_with(sources):
    built = SafeSubspace.build(**sources, energy=0.7)
    assert SafeLora(built, operator="orthogonal").settings.energy == 0.7
    assert SafeLora(built, operator="orthogonal", rank=2).settings.rank == 2
    model = tiny_peft_model()
    defense = SafeLora(built, operator="orthogonal", select="all")
    with defend(model, [defense]) as defended:
        pass
    for module in defended.projection_report.adapters[0].modules:
        assert module.v_rank == built.find(module.name).rank
    for name, (left, vectors) in factors(model, built).items():
        inside = vectors @ (vectors.T @ left)
        assert (inside - left).norm() <= 1e-5 * left.norm(), name


def factors(model, subspace):
    found, _ = lora_parameters(model, "default")
    names = {
        key: key.removeprefix("base_model.model.").removesuffix(".lora_B.weight") for key in found if "lora_B" in key
    }
    return {
        name: (found[key].detach().double(), torch.from_numpy(subspace.find(name).left_vectors).double())
        for key, name in names.items()
    }


def test_sources_are_checked_before_training(sources, tmp_path):
    shutil.copytree(sources["aligned"], tmp_path / "copy")
    with pytest.raises(PairingError, match="aligned and base hold the same weights"):
        SafeSubspace.from_sources(aligned=sources["aligned"], base=tmp_path / "copy")
    subspace = SafeSubspace.build(**sources, rank=2)
    defense = SafeLora(subspace)
    weights = sources["base"] / "model.safetensors"
    original = weights.read_bytes()
    changed = bytearray(original)
    changed[-1] ^= 1
    weights.write_bytes(bytes(changed))
    with pytest.raises(CheckpointError, match=r"SafeLora: .*the base model has changed.*model.safetensors differs"):
        defend(tiny_peft_model(), [defense])
    weights.unlink()
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        defend(tiny_peft_model(), [defense])
    sources["base"].rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="the base model that the subspace was built from is gone"):
        defend(tiny_peft_model(), [defense])
    with pytest.raises(CheckpointError, match="does not say what it was built from"):
        defend(tiny_peft_model(), [SafeLora(SafeSubspace(subspace.modules))])


def test_sources_that_are_gone_after_training(sources):
    model = tiny_peft_model()
    before = adapter_weights(model)
    defended = defend(model, [SafeLora(SafeSubspace.build(**sources, rank=2), select="all")])
    (sources["base"] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        defended.finish()
    assert furthest(before, adapter_weights(model)) == 0


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_norm_that_is_not_what_it_was(sources, device):
    """‖V‖ catches changes that the fingerprint misses. A device sums in another order, so its last digits may differ."""
    name = "model.layers.1.mlp.down_proj"
    built = SafeSubspace.build(**sources, rank=2, device=device)
    module = built.modules[name]

    def finish(off):
        other = replace(module, v_norm=module.v_norm * (1 + off))
        return defend(
            tiny_peft_model(), [SafeLora(replace(built, modules={**built.modules, name: other}), select="all")]
        ).finish()

    allowed = [0.0] if device is None else [0.0, 1e-5, -1e-5]
    for off in allowed:
        finish(off)
    for off in {1e-5, -1e-5, 3e-5, -3e-5} - set(allowed):
        with pytest.raises(CheckpointError, match=r"down_proj: ‖V‖ is .*, but was .* a checkpoint has changed"):
            finish(off)


def test_nan_factors_leave_the_model_as_it_was(sources):
    model = tiny_peft_model()
    defended = defend(model, [SafeLora(SafeSubspace.from_sources(**sources), select="all")])
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"
    dict(model.named_parameters())[key].data[3, 1] = math.nan
    before = adapter_weights(model)
    with pytest.raises(
        CheckpointError, match=r"SafeLora: adapter 'default': .*up_proj.lora_B.weight\" holds NaN at row 3"
    ) as caught:
        defended.finish()
    assert "/tmp" not in str(caught.value)
    after = adapter_weights(model)
    assert all(torch.equal(after[name], value) or value.isnan().any() for name, value in before.items())


def test_models_that_do_not_fit(sources, tmp_path):
    defense = SafeLora(SafeSubspace.from_sources(**sources))
    with pytest.raises(PairingError, match=r"SafeLora: model\.layers\.3\..*the nearest are .*\(and 6 more modules\)"):
        defend(tiny_peft_model(layers=4), [defense])
    other = {
        role: save(FAMILIES["llama"].make(seed, num_hidden_layers=3), tmp_path / f"other-{role}")
        for seed, role in enumerate(sources)
    }
    with pytest.raises(
        PairingError, match=r"down_proj: the adapter's update is \[32, 48\], but the weights are aligned \[32, 24"
    ):
        defend(tiny_peft_model(), [SafeLora(SafeSubspace.from_sources(**other))])
    for lora, message in (({"use_dora": True}, "DoRA"), ({"init_lora_weights": "pissa"}, "pissa")):
        with pytest.raises(AdapterError, match=f"SafeLora: adapter 'default': .*{message}"):
            defend(tiny_peft_model(lora=lora), [defense])
    merged = tiny_peft_model()
    merged.merge_adapter()
    with pytest.raises(SettingsError, match="merged into the model's weights"):
        defend(merged, [defense])
    two = tiny_peft_model()
    two.add_adapter("other", two.peft_config["default"])
    two.base_model.set_adapter(["default", "other"])
    with pytest.raises(SettingsError, match="the adapters default, other are active"):
        defend(two, [defense])
    with pytest.raises(SettingsError, match="no active LoRA adapter"):
        defend(two.unload(), [defense])


def test_settings():
    subspace = random_subspace(tiny_peft_model())
    assert SafeLora(subspace).settings.operator == "safelora"
    assert SafeLora(subspace, at="step").every == 1
    for wrong, message in (
        ({"at": "start"}, 'must be "end" or "step"'),
        ({"every": 2}, 'every belongs to at="step"'),
        ({"operator": "orthogonal"}, "either rank or energy"),
        ({"operator": "saflora"}, "operator must be one of"),
        ({"normalize": "spectral", "operator": "zero"}, "normalize applies to operator safelora only"),
        ({"threshold": 1.5}, "between -1 and 1"),
        ({"num_layers": 3}, "num_layers applies to select number only"),
        ({"at": "step", "threshold": 0.5, "rank": 3}, 'rank, threshold belongs to at="end"'),
        ({"at": "step", "operator": "zero"}, "would drive it to zero"),
        ({"at": "step", "operator": "saflora"}, "operator must be one of"),
        ({"at": "step", "every": 0}, "at least 1"),
    ):
        with pytest.raises(SettingsError, match=f"SafeLora: .*{message}"):
            SafeLora(subspace, **wrong)
    assert (
        repr(SafeLora(subspace, threshold=0.3))
        == "SafeLora(at='end', operator='safelora', select='threshold', threshold=0.3)"
    )
    assert repr(SafeLora(subspace, at="step", select="all")) == "SafeLora(at='step', every=1, operator='orthogonal')"


def test_modules_without_difference_are_left_alone_at_a_step():
    model = tiny_peft_model()
    subspace = random_subspace(model)
    name = "model.layers.0.self_attn.q_proj"
    nothing = ModuleSubspace(np.zeros((32, 0), np.float32), np.zeros(0, np.float32), 0.0, 32)
    subspace = SafeSubspace({**subspace.modules, name: nothing})
    before, window = adapter_weights(model), [collate(rows([7, 3]))]
    after, metrics = train_windows([window], [SafeLora(subspace, at="step")], model=model, optimizer=sgd(model, lr=0.0))
    assert metrics["defense/modules_projected"] == 20
    for key, value in before.items():
        assert torch.equal(after[key], value) == ("lora_A" in key or name in key)
    empty = {
        key: replace(module, left_vectors=module.left_vectors[:, :0], singular_values=module.singular_values[:0])
        for key, module in subspace.modules.items()
    }
    with pytest.raises(PairingError, match="V = aligned - base is zero in every adapted module"):
        defend(model, [SafeLora(SafeSubspace(empty), at="step")])
