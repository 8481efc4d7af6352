"""Which tensor a module meets: prefixes, fused and split spellings, and what is said when there is none or too many."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from families import FAMILIES, adapt, assert_projected, project, rewrite, save, weights
from peft import LoraConfig
from safetensors.torch import load_file

from safelora_fast import project_adapter
from safelora_fast.checkpoints.lora_config import KNOWN, refuse_variants, unknown_keys_note
from safelora_fast.errors import AdapterError, CheckpointError, PairingError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    family = FAMILIES["llama"]
    aligned, base = family.make(1), family.make(2)
    folders = save(aligned, folder / "aligned"), save(base, folder / "base")
    base_weights, adapted = weights(adapt(base, **family.target)), adapt(aligned, **family.target)
    adapter = save(adapted, folder / "adapter")
    truth = project_adapter(adapter, aligned=folders[0], base=folders[1], output=folder / "truth", select="all")
    return folders, adapter, folder / "truth", truth, base_weights


def renamed(change):
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.removeprefix("model."),
        lambda name: f"language_model.{name}",
        lambda name: name.replace("model.", "model.language_model."),
        lambda name: f"base_model.model.{name}",
    ],
    ids=["bare", "language_model", "model.language_model", "base_model.model"],
)
@pytest.mark.parametrize("role", [0, 1], ids=["aligned", "base"])
def test_prefixes(llama, tmp_path, role, change):
    folders, adapter, truth, _, _ = llama
    sources = list(folders)
    sources[role] = rewrite(folders[role], tmp_path / "renamed", renamed(change))
    project_adapter(adapter, aligned=sources[0], base=sources[1], output=tmp_path / "out", select="all")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (truth / WEIGHTS).read_bytes()


def test_prefixes_of_the_adapter(llama, tmp_path):
    """An adapter of a text model inside a multimodal one."""
    folders, adapter, truth, _, _ = llama
    change = renamed(lambda name: name.replace("base_model.model.model.", "base_model.model.language_model.model."))
    other = rewrite(adapter, tmp_path / "adapter", change, file=WEIGHTS)
    project_adapter(other, aligned=folders[0], base=folders[1], output=tmp_path / "out", select="all")
    expected, found = load_file(truth / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(tensor, found[change({key: 0}).popitem()[0]]) for key, tensor in expected.items())


def test_an_exact_name_wins_over_a_wrapped_one(llama, tmp_path):
    folders, adapter, truth, _, _ = llama
    both = rewrite(
        folders[1],
        tmp_path / "both",
        lambda tensors: {**tensors, **{f"language_model.{name}": tensor + 1 for name, tensor in tensors.items()}},
    )
    project_adapter(adapter, aligned=folders[0], base=both, output=tmp_path / "out", select="all")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (truth / WEIGHTS).read_bytes()


def test_ambiguous(llama, tmp_path):
    folders, adapter, _, _, _ = llama

    def twice(tensors):
        return {
            f"{wrapper}.{name}": tensor
            for name, tensor in tensors.items()
            for wrapper in ("language_model", "text_model")
        }

    base = rewrite(folders[1], tmp_path / "twice", twice)
    with pytest.raises(PairingError, match=r"several tensors that may be meant: language_model\.model.*text_model"):
        project_adapter(adapter, aligned=folders[0], base=base, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_names_the_nearest(llama, tmp_path):
    folders, adapter, _, _, _ = llama
    lost = "model.layers.1.self_attn.q_proj.weight"
    base = rewrite(folders[1], tmp_path / "lost", lambda tensors: {k: v for k, v in tensors.items() if k != lost})
    with pytest.raises(PairingError) as raised:
        project_adapter(adapter, aligned=folders[0], base=base, output=tmp_path / "out")
    message = str(raised.value)
    assert message.startswith("model.layers.1.self_attn.q_proj: the base model")
    assert "the nearest are" in message
    assert "model.layers.0.self_attn.q_proj.weight, model.layers.1.self_attn." in message


def test_other_shape(llama, tmp_path):
    folders, adapter, _, _, _ = llama
    name = "model.layers.0.mlp.up_proj.weight"
    base = rewrite(folders[1], tmp_path / "shape", lambda tensors: {**tensors, name: torch.ones(25, 32)})
    with pytest.raises(PairingError, match=r"model\.layers\.0\.mlp\.up_proj: .*\[24, 32\].*\[25, 32\]"):
        project_adapter(adapter, aligned=folders[0], base=base, output=tmp_path / "out")


def fuse(tensors):
    """Phi-3's spelling: q, k and v in one tensor, gate and up in one."""
    fused = dict(tensors)
    for layer in range(2):
        for owner, whole, parts in (("self_attn", "qkv_proj", "qkv"), ("mlp", "gate_up_proj", ("gate", "up"))):
            names = [f"model.layers.{layer}.{owner}.{part}_proj.weight" for part in parts]
            fused[f"model.layers.{layer}.{owner}.{whole}.weight"] = torch.cat([fused.pop(name) for name in names])
    return fused


@pytest.mark.parametrize("role", [0, 1], ids=["aligned", "base"])
def test_fused_on_disk_split_in_the_adapter(llama, tmp_path, role):
    folders, adapter, truth, _, _ = llama
    sources = list(folders)
    sources[role] = rewrite(folders[role], tmp_path / "fused", fuse)
    project_adapter(adapter, aligned=sources[0], base=sources[1], output=tmp_path / "out", select="all")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (truth / WEIGHTS).read_bytes()


def test_fused_in_the_adapter_split_on_disk(tmp_path):
    family = FAMILIES["phi3"]
    aligned, base = family.make(1), family.make(2)
    folders = save(aligned, tmp_path / "aligned"), save(base, tmp_path / "base")

    def split(tensors):
        apart = {}
        for name, tensor in tensors.items():
            if "qkv_proj" in name:
                for part, rows in zip("qkv", tensor.split([32, 16, 16]), strict=True):
                    apart[name.replace("qkv_proj", f"{part}_proj")] = rows
            elif "gate_up_proj" in name:
                for part, rows in zip(("gate", "up"), tensor.chunk(2), strict=True):
                    apart[name.replace("gate_up_proj", f"{part}_proj")] = rows
            else:
                apart[name] = tensor
        return apart

    other = rewrite(folders[1], tmp_path / "split", split)
    base_weights, adapted = weights(adapt(base, **family.target)), adapt(aligned, **family.target)
    (result,) = project([save(adapted, tmp_path / "adapter")], folders[0], other, tmp_path / "out")
    assert_projected(result, adapted, base_weights)


def together(tensors):
    """Mixtral as the loaded model holds it: one tensor for all experts, where transformers writes w1, w2 and w3 of each."""
    fused = dict(tensors)
    for layer in range(2):
        experts = f"model.layers.{layer}.block_sparse_moe.experts"
        w1, w2, w3 = (
            torch.stack([fused.pop(f"{experts}.{expert}.{name}.weight") for expert in range(3)])
            for name in ("w1", "w2", "w3")
        )
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([w1, w3], 1)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    return fused


@pytest.mark.parametrize("role", [0, 1], ids=["aligned", "base"])
def test_experts_in_one_tensor_on_disk(tmp_path, role):
    family = FAMILIES["mixtral"]
    aligned, base = family.make(1), family.make(2)
    folders = [save(aligned, tmp_path / "aligned"), save(base, tmp_path / "base")]
    folders[role] = rewrite(folders[role], tmp_path / "together", together)
    base_weights, adapted = weights(adapt(base, **family.target)), adapt(aligned, **family.target)
    (result,) = project([save(adapted, tmp_path / "adapter")], *folders, tmp_path / "out")
    assert_projected(result, adapted, base_weights)


def experts_as_modules(tensors):
    """A model whose experts are modules of their own, as transformers had them before version 5."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        if ".experts." not in name:
            continue
        *owners, leaf, _ = name.split(".")
        module = root
        for owner in owners:
            if not hasattr(module, owner):
                module.add_module(owner, torch.nn.Module())
            module = getattr(module, owner)
        linear = torch.nn.Linear(*reversed(tensor.shape), bias=False)
        linear.weight.data = tensor.clone()
        module.add_module(leaf, linear)
    return root


@pytest.mark.parametrize("layout", [dict, together], ids=["apart", "together"])
def test_adapters_of_single_experts(tmp_path, layout):
    family = FAMILIES["mixtral"]
    folders = [save(family.make(seed), tmp_path / f"{seed}") for seed in (1, 2)]
    target = {"target_modules": ["w1", "w2", "w3"]}
    aligned, base = (adapt(experts_as_modules(load_file(folder / "model.safetensors")), **target) for folder in folders)
    base_weights, adapter = weights(base), save(aligned, tmp_path / "adapter")
    folders[1] = rewrite(folders[1], tmp_path / "layout", layout)
    (result,) = project([adapter], *folders, tmp_path / "out")
    assert len(result.cosines) == 2 * 3 * 3
    assert_projected(result, aligned, base_weights)


def test_a_module_whose_v_is_zero(llama, tmp_path):
    folders, adapter, _, _, _ = llama
    same = "model.layers.0.self_attn.o_proj"
    weight = load_file(folders[0] / "model.safetensors")[f"{same}.weight"]
    base = rewrite(folders[1], tmp_path / "base", lambda tensors: {**tensors, f"{same}.weight": weight})
    report = project_adapter(adapter, aligned=folders[0], base=base, output=tmp_path / "out", select="all")
    (module,) = (module for module in report.adapters[0].modules if module.name == same)
    assert module.v_norm == 0
    assert not module.projected
    assert module.reason
    assert np.isnan(module.cosine)
    key = f"base_model.model.{same}.lora_B.weight"
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)[key], load_file(adapter / WEIGHTS)[key])
    stored = json.loads((tmp_path / "out" / "safelora_report.json").read_text())
    assert stored["adapters"][0]["counts"] == {"modules": 14, "projected": 13, "without_cosine": 1, "copied_tensors": 0}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_futurelora": True}, "use_futurelora is set, which is not known here"),
        ({"future_config": {"depth": 2}}, "future_config is set, which is not known here"),
        ({"aligned_alpha": 4.0}, "aligned_alpha is set, which is not known here"),
        ({"lora_gating": True}, "lora_gating is set, which is not known here"),
        ({"scale_rank": "sqrt"}, "scale_rank is set, which is not known here"),
        ({"init_lora_weights": "futureinit"}, "init_lora_weights is 'futureinit', which is not known here"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "replicated layers"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"peft_type": "LOHA"}, "only LoRA"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_variants_are_refused_with_the_reason(llama, tmp_path, config, reason):
    folders, adapter, _, _, _ = llama
    variant = rewrite(adapter, tmp_path / "variant", config=config, file=WEIGHTS)
    with pytest.raises(AdapterError, match=reason):
        project_adapter(variant, aligned=folders[0], base=folders[1], output=tmp_path / "out")


def test_dora_as_peft_writes_it(llama, tmp_path):
    folders, _, _, _, _ = llama
    adapter = save(adapt(FAMILIES["llama"].make(1), target_modules=["q_proj"], use_dora=True), tmp_path / "dora")
    with pytest.raises(AdapterError, match="learned magnitude"):
        project_adapter(adapter, aligned=folders[0], base=folders[1], output=tmp_path / "out")


@pytest.mark.parametrize(
    "config", [{"use_rslora": True}, {"loftq_config": {}}, {"runtime_config": {"a": False}}], ids=str
)
def test_settings_that_leave_a_plain_product_are_taken(llama, tmp_path, config):
    folders, adapter, truth, _, _ = llama
    same = rewrite(adapter, tmp_path / "same", config=config, file=WEIGHTS)
    project_adapter(same, aligned=folders[0], base=folders[1], output=tmp_path / "out", select="all")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (truth / WEIGHTS).read_bytes()


def test_other_unknown_settings_are_named(llama, tmp_path):
    folders, adapter, truth, _, _ = llama
    neutral = {"use_futurelora": False, "future_alpha": None, "future_config": {}, "depth": 0}
    same = rewrite(adapter, tmp_path / "same", config={**neutral, "shiny": True, "tags": ["a"]}, file=WEIGHTS)
    report = project_adapter(same, aligned=folders[0], base=folders[1], output=tmp_path / "out", select="all")
    (warning,) = [warning for warning in report.warnings if "not known here" in warning]
    assert "(shiny = True, tags = ['a'])" in warning
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (truth / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "setting",
    [
        {"lora_name": "helpful"},
        {"lora_plus_ratio": 16},
        {"config_file": "train.yaml"},
        {"alpha_schedule": "cosine"},
        {"gate_checks": True},
        {"upscaled_from": "x"},
        {"tool_config": "train.yaml"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_of_other_tools_are_warned_of(llama, setting):
    (key,) = setting
    config = {**json.loads((llama[1] / "adapter_config.json").read_text()), **setting}
    refuse_variants(llama[1], config)
    (note,) = unknown_keys_note(config)
    assert f"({key} = " in note


@pytest.mark.parametrize(
    "setting", [{"lora_gate": [0.5]}, {"scaling": 2.0}, {"lora_variant": "x"}, {"x_multiplier": 3}], ids=str
)
def test_settings_that_look_like_a_variant_are_refused(llama, setting):
    config = {**json.loads((llama[1] / "adapter_config.json").read_text()), **setting}
    with pytest.raises(AdapterError, match="is set, which is not known here"):
        refuse_variants(llama[1], config)


@pytest.mark.parametrize(
    ("config", "odd"),
    [({"r": 160}, True), ({"rank_pattern": {"q_proj": 2}}, True), ({"r": 160, "rank_pattern": {".*": None}}, False)],
    ids=str,
)
def test_a_rank_that_the_settings_do_not_give_is_named(llama, tmp_path, config, odd):
    """PEFT makes factors of the configuration's rank and refuses those of another."""
    folders, adapter, truth, _, _ = llama
    if "r" in config and "rank_pattern" in config:
        rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
        config = {**config, "rank_pattern": {".*": rank}}
    same = rewrite(adapter, tmp_path / "same", config=config, file=WEIGHTS)
    report = project_adapter(same, aligned=folders[0], base=folders[1], output=tmp_path / "out", select="all")
    warnings = [warning for warning in report.warnings if "have rank" in warning]
    assert len(warnings) == odd
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (truth / WEIGHTS).read_bytes()


def test_every_setting_of_the_installed_peft_is_known():
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= KNOWN


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied weights in several ways
def test_factors_that_embeddings_and_head_share_are_refused(tmp_path):
    family = FAMILIES["gemma"]
    folders = save(family.make(1), tmp_path / "aligned"), save(family.make(2), tmp_path / "base")
    tied = adapt(family.make(1), target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    with pytest.raises(AdapterError, match="ensure_weight_tying"):
        project_adapter(save(tied, tmp_path / "tied"), aligned=folders[0], base=folders[1], output=tmp_path / "out")


def test_experts_whose_orientation_nothing_tells(tmp_path):
    """A square expert kept (in, out) looks like one kept (out, in) where no configuration says which."""
    family = FAMILIES["gpt_oss"]
    folders = [save(family.make(seed, intermediate_size=32), tmp_path / str(seed)) for seed in (1, 2)]
    adapter = save(adapt(family.make(1, intermediate_size=32), **family.target), tmp_path / "adapter")
    for folder in folders:
        (folder / "config.json").unlink()
    with pytest.raises(PairingError, match=r"\(out, in\) or \(in, out\).*config\.json"):
        project_adapter(adapter, aligned=folders[0], base=folders[1], output=tmp_path / "out")


@pytest.mark.parametrize("role", ["aligned", "base"])
def test_a_quantization_config_left_beside_plain_weights(llama, tmp_path, role):
    """Merged to 16 bits, and the configuration is still that of the quantized model: the tensors tell."""
    folders, adapter, truth, _, _ = llama
    sources = dict(zip(("aligned", "base"), folders, strict=True))
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    sources[role] = rewrite(sources[role], tmp_path / "declared", config=config)
    report = project_adapter(adapter, **sources, output=tmp_path / "out", select="all")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (truth / WEIGHTS).read_bytes()
    (warning,) = (line for line in report.warnings if "quantization_config (bitsandbytes)" in line)
    assert str(sources[role]) in warning


@pytest.mark.parametrize("beside", ["codebooks", "weight_quantizer.scale", "weight._scale", "input_scale"])
def test_a_quantized_model_with_scales_of_any_name(llama, tmp_path, beside):
    folders, adapter, _, _, _ = llama
    name = "model.layers.0.self_attn.q_proj"
    scaled = rewrite(
        folders[0],
        tmp_path / "scaled",
        lambda tensors: {**tensors, f"{name}.{beside}": torch.ones(1)},
        config={"quantization_config": {"quant_method": "other"}},
    )
    with pytest.raises(CheckpointError, match=rf"{name}\.weight is quantized \({name}\.{beside} lies beside it"):
        project_adapter(adapter, aligned=scaled, base=folders[1], output=tmp_path / "out")


@pytest.mark.parametrize("role", ["aligned", "base"])
def test_quantized_checkpoints_are_refused(llama, tmp_path, role):
    folders, adapter, _, _, _ = llama
    sources = dict(zip(("aligned", "base"), folders, strict=True))
    name = "model.layers.0.self_attn.q_proj"

    def packed(tensors):
        return {**{k: v for k, v in tensors.items() if k != f"{name}.weight"}, f"{name}.qweight": torch.ones(2, 2)}

    silent = {**sources, role: rewrite(sources[role], tmp_path / "silent", packed)}
    with pytest.raises(PairingError, match=rf"{name}: the {role} model .* holds it quantized"):
        project_adapter(adapter, **silent, output=tmp_path / "out")
    unknown = {
        **sources,
        role: rewrite(
            sources[role],
            tmp_path / "unknown",
            lambda tensors: {k: v for k, v in tensors.items() if k != f"{name}.weight"},
            config={"quantization_config": {"quant_method": "other"}},
        ),
    }
    with pytest.raises(
        PairingError, match=rf"{name}: the {role} model .* is quantized as its config.json says .other."
    ):
        project_adapter(adapter, **unknown, output=tmp_path / "out")
    integers = rewrite(
        sources[role],
        tmp_path / "integers",
        lambda tensors: {**tensors, f"{name}.weight": torch.ones(32, 32).to(torch.int8)},
    )
    with pytest.raises(CheckpointError, match="is I8; weights must be F32, BF16 or F16, not quantized"):
        project_adapter(adapter, **{**sources, role: integers}, output=tmp_path / "out")
    scaled = {
        **sources,
        role: rewrite(
            sources[role], tmp_path / "scaled", lambda tensors: {**tensors, f"{name}.weight_scale_inv": torch.ones(1)}
        ),
    }
    with pytest.raises(CheckpointError, match="is quantized"):
        project_adapter(adapter, **scaled, output=tmp_path / "out")


@pytest.mark.filterwarnings("ignore:Adapter .default.. 2 LoRA tensor:Warning")  # PEFT takes its own biases for shards
def test_modules_to_save_and_biases_are_copied_through_and_reported(tmp_path):
    family = FAMILIES["qwen2"]
    aligned, base = family.make(1), family.make(2)
    folders = save(aligned, tmp_path / "aligned"), save(base, tmp_path / "base")
    adapted = adapt(aligned, target_modules=["q_proj"], lora_bias=True, modules_to_save=["lm_head"])
    adapter = save(adapted, tmp_path / "adapter")
    report = project_adapter(adapter, aligned=folders[0], base=folders[1], output=tmp_path / "out", select="all")
    copied = {entry["tensor"] for entry in report.adapters[0].copied}
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert copied == {key for key in before if key.endswith(("lora_B.bias", "lm_head.weight"))} != set()
    assert all(torch.equal(before[key], after[key]) for key in copied)
    assert all(entry["reason"] for entry in report.adapters[0].copied)


@pytest.mark.parametrize("alpha", [None, "8", True], ids=str)
def test_an_alpha_that_is_no_number_is_refused(llama, tmp_path, alpha):
    folders, adapter, *_ = llama
    odd = rewrite(adapter, tmp_path / "odd", config={"lora_alpha": alpha}, file=WEIGHTS)
    with pytest.raises(AdapterError, match=r"lora_alpha must be a finite number, not (null|.8.|True)$"):
        project_adapter(odd, aligned=folders[0], base=folders[1], output=tmp_path / "out")
