"""Pair modules with tensors: prefixes, fused and split spellings, and errors if no tensor or several tensors match."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from families import FAMILIES, adapt, assert_projected, check_projection, project, rewrite, save, weights
from peft import LoraConfig
from safetensors.torch import load_file

from safelora_fast import project_adapter
from safelora_fast.checkpoints.lora_config import KNOWN, refuse_variants, unknown_keys_note
from safelora_fast.errors import AdapterError, CheckpointError, PairingError

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = "adapter_model.safetensors"
QUERY = "model.layers.0.self_attn.q_proj"
ROLES = ["aligned", "base"]


@dataclass(frozen=True)
class Made:
    """Two checkpoints, an adapter, the bytes of its projection, and a folder for the test."""

    aligned: Path
    base: Path
    adapter: Path
    truth: bytes
    folder: Path

    def changed(self, what, change=dict, **config):
        """Copy a checkpoint or the adapter with other tensors or settings."""
        file = WEIGHTS if what == "adapter" else "model.safetensors"
        return {what: rewrite(getattr(self, what), self.folder / f"changed-{what}", change, config, file)}

    def project(self, **changes):
        models = {"aligned": self.aligned, "base": self.base, "output": self.folder / "out", "select": "all"}
        return project_adapter(changes.pop("adapter", self.adapter), **{**models, **changes})

    def check_same(self, **changes):
        """Check that the changes do not affect the projection."""
        report = self.project(**changes)
        assert (self.folder / "out" / WEIGHTS).read_bytes() == self.truth
        return report

    def check_refused(self, error, words, **changes):
        with pytest.raises(error, match=words):
            self.project(**changes)
        assert not (self.folder / "out").exists()

    def config(self, **settings):
        return {**json.loads((self.adapter / "adapter_config.json").read_text()), **settings}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, family = tmp_path_factory.mktemp("llama"), FAMILIES["llama"]
    models = save(family.make(1), folder / "aligned"), save(family.make(2), folder / "base")
    made = Made(*models, save(adapt(family.make(1), **family.target), folder / "adapter"), b"", folder)
    made.project()
    return dataclasses.replace(made, truth=(folder / "out" / WEIGHTS).read_bytes())


@pytest.fixture
def llama(made, tmp_path):
    return dataclasses.replace(made, folder=tmp_path)


def renamed(change):
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def having(name, tensor):
    return lambda tensors: {**tensors, name: tensor}


PREFIXES = {
    "bare": lambda name: name.removeprefix("model."),
    "language_model": lambda name: f"language_model.{name}",
    "model.language_model": lambda name: name.replace("model.", "model.language_model."),
    "base_model.model": lambda name: f"base_model.model.{name}",
}


@pytest.mark.parametrize("change", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("role", ROLES)
def test_prefixes(llama, role, change):
    llama.check_same(**llama.changed(role, renamed(change)))


def test_prefixes_of_the_adapter(llama):
    """An adapter of a text model inside a multimodal model."""

    def change(name):
        return name.replace("base_model.model.model.", "base_model.model.language_model.model.")

    other = llama.changed("adapter", renamed(change))
    llama.check_same()
    expected = load_file(llama.folder / "out" / WEIGHTS)
    llama.project(**other, overwrite=True)
    found = load_file(llama.folder / "out" / WEIGHTS)
    assert all(torch.equal(tensor, found[change(key)]) for key, tensor in expected.items())


def test_an_exact_name_wins_over_a_wrapped_one(llama):
    wrapped = renamed(lambda name: f"language_model.{name}")
    both = llama.changed("base", lambda tensors: {**wrapped({k: t + 1 for k, t in tensors.items()}), **tensors})
    llama.check_same(**both)


def test_ambiguous(llama):
    one, other = (
        renamed(lambda name, wrapper=wrapper: f"{wrapper}.{name}") for wrapper in ("language_model", "text_model")
    )
    twice = llama.changed("base", lambda tensors: {**one(tensors), **other(tensors)})
    llama.check_refused(PairingError, r"several tensors that may be meant: language_model\.model.*text_model", **twice)


def test_missing_names_the_nearest(llama):
    lost = llama.changed("base", without("model.layers.1.self_attn.q_proj.weight"))
    words = (
        r"^model\.layers\.1\.self_attn\.q_proj: the base model .*the nearest are .*"
        r"model\.layers\.0\.self_attn\.q_proj\.weight, model\.layers\.1\.self_attn\."
    )
    llama.check_refused(PairingError, words, **lost)


def test_other_shape(llama):
    other = llama.changed("base", having("model.layers.0.mlp.up_proj.weight", torch.ones(25, 32)))
    llama.check_refused(PairingError, r"model\.layers\.0\.mlp\.up_proj: .*\[24, 32\].*\[25, 32\]", **other)


def fuse(tensors):
    """Use Phi-3's spelling: q, k and v in one tensor, gate and up in one."""
    fused = dict(tensors)
    for layer in range(2):
        for owner, whole, parts in (("self_attn", "qkv_proj", "qkv"), ("mlp", "gate_up_proj", ("gate", "up"))):
            names = [f"model.layers.{layer}.{owner}.{part}_proj.weight" for part in parts]
            fused[f"model.layers.{layer}.{owner}.{whole}.weight"] = torch.cat([fused.pop(name) for name in names])
    return fused


def split(tensors):
    """Reverse :func:`fuse`."""
    apart = {}
    for name, tensor in tensors.items():
        if "qkv_proj" in name:
            parts = zip("qkv", tensor.split([32, 16, 16]), strict=True)
            apart |= {name.replace("qkv_proj", f"{part}_proj"): rows for part, rows in parts}
        elif "gate_up_proj" in name:
            parts = zip(("gate", "up"), tensor.chunk(2), strict=True)
            apart |= {name.replace("gate_up_proj", f"{part}_proj"): rows for part, rows in parts}
        else:
            apart[name] = tensor
    return apart


@pytest.mark.parametrize("role", ROLES)
def test_fused_on_disk_split_in_the_adapter(llama, role):
    llama.check_same(**llama.changed(role, fuse))


def test_fused_in_the_adapter_split_on_disk(tmp_path):
    family = FAMILIES["phi3"]
    check_projection(tmp_path, (family.make(1), family.make(2)), family.target, (dict, split))


def together(tensors):
    """Store Mixtral like the loaded model: one tensor for all experts. On disk, each expert has w1, w2 and w3."""
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


@pytest.mark.parametrize("change", [(together, dict), (dict, together)], ids=ROLES)
def test_experts_in_one_tensor_on_disk(tmp_path, change):
    family = FAMILIES["mixtral"]
    check_projection(tmp_path, (family.make(1), family.make(2)), family.target, change)


def experts_as_modules(tensors):
    """Return a model whose experts are separate modules, as in transformers before version 5."""
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


def test_a_module_whose_v_is_zero(llama):
    same = "model.layers.0.self_attn.o_proj"
    weight = load_file(llama.aligned / "model.safetensors")[f"{same}.weight"]
    report = llama.project(**llama.changed("base", having(f"{same}.weight", weight)))
    (module,) = (module for module in report.adapters[0].modules if module.name == same)
    assert (module.v_norm, module.projected) == (0, False)
    assert module.reason
    assert np.isnan(module.cosine)
    key = f"base_model.model.{same}.lora_B.weight"
    assert torch.equal(load_file(llama.folder / "out" / WEIGHTS)[key], load_file(llama.adapter / WEIGHTS)[key])
    stored = json.loads((llama.folder / "out" / "safelora_report.json").read_text())
    assert stored["adapters"][0]["counts"] == {"modules": 14, "projected": 13, "without_cosine": 1, "copied_tensors": 0}


UNKNOWN = "is set, which is not known here"


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_futurelora": True}, f"use_futurelora {UNKNOWN}"),
        ({"future_config": {"depth": 2}}, f"future_config {UNKNOWN}"),
        ({"aligned_alpha": 4.0}, f"aligned_alpha {UNKNOWN}"),
        ({"lora_gating": True}, f"lora_gating {UNKNOWN}"),
        ({"scale_rank": "sqrt"}, f"scale_rank {UNKNOWN}"),
        ({"lora_gate": [0.5]}, UNKNOWN),
        ({"scaling": 2.0}, UNKNOWN),
        ({"lora_variant": "x"}, UNKNOWN),
        ({"x_multiplier": 3}, UNKNOWN),
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
def test_variants_are_refused_with_the_reason(llama, setting, reason):
    with pytest.raises(AdapterError, match=reason):
        refuse_variants(llama.adapter, llama.config(**setting))


def test_a_variant_is_refused_before_anything_is_written(llama):
    llama.check_refused(AdapterError, "QALoRA", **llama.changed("adapter", use_qalora=True))


def test_dora_as_peft_writes_it(llama):
    adapter = save(adapt(FAMILIES["llama"].make(1), target_modules=["q_proj"], use_dora=True), llama.folder / "dora")
    llama.check_refused(AdapterError, "learned magnitude", adapter=adapter)


@pytest.mark.parametrize(
    ("key", "tool"),
    [
        ("layers.0.attn.q_proj.lora_a.weight", "MLX or torchtune"),
        ("model.layers.0.self_attn.q_proj.lora_b", "MLX or torchtune"),
        ("lora_unet_down_blocks_0.lora_down.weight", "kohya's scripts or diffusers"),
        ("unet.to_q.lora.up.weight", "kohya's scripts or diffusers"),
    ],
)
def test_keys_of_other_tools(llama, key, tool):
    other = llama.changed("adapter", lambda _: {key: torch.ones(4, 32)})
    llama.check_refused(AdapterError, f"{key}' is a name of {tool}, not of PEFT; convert", **other)


def test_an_adapter_inside_another(llama):
    nested = llama.changed("adapter", renamed(lambda key: key.replace(".lora_", ".base_layer.lora_")))
    llama.check_refused(AdapterError, "below base_layer, as PEFT names an adapter inside another one", **nested)


@pytest.mark.parametrize(
    "config", [{"use_rslora": True}, {"loftq_config": {}}, {"runtime_config": {"a": False}}], ids=str
)
def test_settings_that_leave_a_plain_product_are_taken(llama, config):
    llama.check_same(**llama.changed("adapter", **config))


def test_other_unknown_settings_are_named(llama):
    neutral = {"use_futurelora": False, "future_alpha": None, "future_config": {}, "depth": 0}
    report = llama.check_same(**llama.changed("adapter", **neutral, shiny=True, tags=["a"]))
    (warning,) = [warning for warning in report.warnings if "not known here" in warning]
    assert "(shiny = True, tags = ['a'])" in warning


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_name", "helpful"),
        ("lora_plus_ratio", 16),
        ("config_file", "train.yaml"),
        ("alpha_schedule", "cosine"),
        ("gate_checks", True),
        ("upscaled_from", "x"),
        ("tool_config", "train.yaml"),
    ],
)
def test_settings_of_other_tools_are_warned_of(llama, key, value):
    config = llama.config(**{key: value})
    refuse_variants(llama.adapter, config)
    (note,) = unknown_keys_note(config)
    assert f"({key} = " in note


@pytest.mark.parametrize(
    ("config", "odd"),
    [({"r": 160}, True), ({"rank_pattern": {"q_proj": 2}}, True), ({"r": 160, "rank_pattern": {".*": 4}}, False)],
    ids=str,
)
def test_a_rank_that_the_settings_do_not_give_is_named(llama, config, odd):
    """PEFT creates LoRA matrices of the configured rank and rejects those of another rank."""
    assert llama.config()["r"] == 4
    report = llama.check_same(**llama.changed("adapter", **config))
    assert sum("have rank" in warning for warning in report.warnings) == odd


@pytest.mark.parametrize("alpha", [None, "8", True], ids=str)
def test_an_alpha_that_is_no_number_is_refused(llama, alpha):
    words = r"lora_alpha must be a finite number, not (null|.8.|True)$"
    llama.check_refused(AdapterError, words, **llama.changed("adapter", lora_alpha=alpha))


def test_every_setting_of_the_installed_peft_is_known():
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= KNOWN


@pytest.mark.filterwarnings("ignore")  # PEFT warns about tied weights in several ways
def test_factors_that_embeddings_and_head_share_are_refused(tmp_path):
    family = FAMILIES["gemma"]
    target = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    with pytest.raises(AdapterError, match="ensure_weight_tying"):
        check_projection(tmp_path, (family.make(1), family.make(2)), target)


def test_experts_whose_orientation_nothing_tells(tmp_path):
    """Without a model type, a square expert stored (in, out) looks like one stored (out, in)."""
    family = FAMILIES["gpt_oss"]
    folders = [save(family.make(seed, intermediate_size=32), tmp_path / str(seed)) for seed in (1, 2)]
    adapter = save(adapt(family.make(1, intermediate_size=32), **family.target), tmp_path / "adapter")
    for folder in folders:
        (folder / "config.json").unlink()
    with pytest.raises(PairingError, match=r"\(out, in\) or \(in, out\).*config\.json"):
        project_adapter(adapter, aligned=folders[0], base=folders[1], output=tmp_path / "out")


@pytest.mark.parametrize("role", ROLES)
def test_a_quantization_config_left_beside_plain_weights(llama, role):
    """The weights were merged to 16 bits, but the configuration still says quantized. The tensors decide."""
    declared = llama.changed(role, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    (warning,) = (w for w in llama.check_same(**declared).warnings if "quantization_config (bitsandbytes)" in w)
    assert str(declared[role]) in warning


OTHER = {"quantization_config": {"quant_method": "other"}}


def packed(tensors):
    return {**without(f"{QUERY}.weight")(tensors), f"{QUERY}.qweight": torch.ones(2, 2)}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("change", "config", "error", "words"),
    [
        *(
            (having(f"{QUERY}.{beside}", torch.ones(1)), OTHER, CheckpointError,
             rf"{QUERY}\.weight is quantised \({QUERY}\.{beside} lies beside it")
            for beside in ("codebooks", "weight_quantizer.scale", "weight._scale", "input_scale")
        ),
        (packed, {}, PairingError, rf"{QUERY}: the ROLE model .* holds it quantized"),
        (without(f"{QUERY}.weight"), OTHER, PairingError,
         rf"{QUERY}: the ROLE model .* is quantized as its config.json says .other."),
        (having(f"{QUERY}.weight", torch.ones(32, 32).to(torch.int8)), {}, CheckpointError,
         "is I8; weights must be F32, BF16 or F16, not quantized"),
        (having(f"{QUERY}.weight_scale_inv", torch.ones(1)), {}, CheckpointError, "is quantised"),
    ],
    ids=["codebooks", "weight_quantizer", "weight._scale", "input_scale", "qweight", "unknown", "int8", "scale_inv"],
)  # fmt: skip
def test_quantized_checkpoints_are_refused(llama, role, change, config, error, words):
    llama.check_refused(error, words.replace("ROLE", role), **llama.changed(role, change, **config))


@pytest.mark.filterwarnings("ignore:Adapter .default.. 2 LoRA tensor:Warning")  # PEFT takes its biases for shards
def test_modules_to_save_and_biases_are_copied_through_and_reported(tmp_path):
    family = FAMILIES["qwen2"]
    folders = [save(family.make(seed), tmp_path / str(seed)) for seed in (1, 2)]
    adapted = adapt(family.make(1), target_modules=["q_proj"], lora_bias=True, modules_to_save=["lm_head"])
    adapter = save(adapted, tmp_path / "adapter")
    report = project_adapter(adapter, aligned=folders[0], base=folders[1], output=tmp_path / "out", select="all")
    copied = {entry["tensor"] for entry in report.adapters[0].copied}
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert copied == {key for key in before if key.endswith(("lora_B.bias", "lm_head.weight"))} != set()
    assert all(torch.equal(before[key], after[key]) for key in copied)
    assert all(entry["reason"] for entry in report.adapters[0].copied)
