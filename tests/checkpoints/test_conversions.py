"""Checkpoints whose names and layouts transformers converts on loading, compared with the weights that it loads.

Every matrix that would be read for V is compared, bit by bit, with the parameter of the loaded model.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from families import adapt, check_projection, rewrite, save
from safetensors.torch import load_file
from small_models import experts, linears, read, small_model

from safelora_fast import project_adapter
from safelora_fast.checkpoints import conversions
from safelora_fast.checkpoints.geometry import ExpertWeights, matrix_of
from safelora_fast.checkpoints.pairing import TensorNames
from safelora_fast.checkpoints.sources import open_checkpoint
from safelora_fast.errors import PairingError

pytest.importorskip("transformers.conversion_mapping", reason="this transformers converts no names")
core_model_loading = pytest.importorskip(
    "transformers.core_model_loading", reason="this transformers converts no names"
)

# Families in the table that have small models, each with the class that is saved.
FAMILIES = {
    "nemotron_h": "NemotronHForCausalLM",
    "exaone": "LlamaForCausalLM",
    "dory": "DoryForCausalLM",
    "hrm_text": "HrmTextForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM",
    "bailing_hybrid": "BailingHybridForCausalLM",
    "sarvam_moe": "Glm4MoeForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "laguna": "LagunaForCausalLM",
    "hy_v3": "HYV3ForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM",
    "axk2": "AXK2ForCausalLM",
    "mistral_large4_text": "MistralLarge4TextModel",
    "mixtral": "MixtralForCausalLM",
    "minimax": "MiniMaxForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "jamba": "JambaForCausalLM",
    "aria": "AriaForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
    "pi0": "PI0ForConditionalGeneration",
    "cosmos3_omni": "Cosmos3OmniForConditionalGeneration",
    "altclip": "AltCLIPModel",
    "radio": "RadioModel",
    "swin": "SwinModel",
    "gte": "GteModel",
    "nomic_bert": "NomicBertModel",
    "jina_embeddings_v3": "JinaEmbeddingsV3Model",
    "timesfm2_5": "TimesFm2_5Model",
    "cohere_asr": "CohereAsrModel",
    "sam3_tracker": "Sam3TrackerModel",
}


def made(model_type, seed):
    name = FAMILIES[model_type]
    if not hasattr(transformers, name) or model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name} of {model_type}")
    return small_model(model_type, name, seed)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_read_is_what_transformers_loads(tmp_path, model_type):
    kind = type(made(model_type, 1))
    save(made(model_type, 1), tmp_path / "model")
    model = kind.from_pretrained(tmp_path / "model")
    names = TensorNames(open_checkpoint(tmp_path / "model", role="aligned"), "aligned")
    count = 0
    for name, weight, embedding in linears(model):
        found = matrix_of(names, names.weight(name), name, tuple(weight.shape), embedding=embedding)
        assert torch.equal(read(found), weight), name
        count += 1
    for name, key, stacked in experts(model):
        matrices = ExpertWeights(name, {key: names.parameter(name, key)}).matrices(names, key)
        assert len(matrices) == len(stacked), name
        for matrix, expert in zip(matrices, stacked, strict=True):
            assert any(torch.equal(read(matrix), each) for each in (expert, expert.T)), name  # some are (in, out)
        count += 1
    assert count > 4


@pytest.mark.parametrize("model_type", ["nemotron_h", "exaone", "hrm_text", "deepseek_v4", "phimoe"])
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_converted_models(tmp_path, model_type):
    """Adapters use the loaded model's names, whatever the names on disk are."""
    # PEFT rejects out_proj of Mamba.
    target = {"target_modules": "all-linear", "exclude_modules": ["out_proj"], "task_type": "CAUSAL_LM"}
    check_projection(tmp_path, (made(model_type, 1), made(model_type, 2)), target)
    adapter, written = tmp_path / "adapter", tmp_path / "written"
    project_adapter(adapter, aligned=tmp_path / "aligned", base=tmp_path / "base", output=written)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (written, adapter))
    assert ours.keys() == theirs.keys()


def test_rows_that_transformers_rearranges_are_refused(tmp_path):
    FAMILIES_OF_VISION = ("kimi_k25", "Kimi_K25ForConditionalGeneration")
    if not hasattr(transformers, FAMILIES_OF_VISION[1]):
        pytest.skip("this transformers has no such model")
    save(small_model(*FAMILIES_OF_VISION, 1), tmp_path / "model")
    names = TensorNames(open_checkpoint(tmp_path / "model", role="base"), "base")
    with pytest.raises(
        PairingError, match=r"attn\.q_proj\.weight: transformers rearranges .*wqkv.*Chunk, PermuteForRope"
    ):
        names.weight("model.vision_tower.layers.0.attn.q_proj")
    # `fc1` on disk is the loaded model's `fc2`, and `fc0` its `fc1`.
    for ours, theirs in (("fc1", "fc0"), ("fc2", "fc1")):
        (piece,) = names.weight(f"model.vision_tower.layers.0.mlp.{ours}")
        assert piece.tensor.endswith(f"blocks.0.mlp.{theirs}.weight")


@pytest.mark.filterwarnings("ignore")
def test_keys_without_the_decoder_do_not_get_its_name_on_disk(tmp_path):
    """The loaded Nemotron-H has no `backbone`, so PEFT would find nothing under that name."""
    folders = [save(made("nemotron_h", seed), tmp_path / f"{seed}") for seed in (1, 2)]
    adapter = save(
        adapt(made("nemotron_h", 1), target_modules=["in_proj"], task_type="CAUSAL_LM"), tmp_path / "adapter"
    )
    cut = rewrite(
        adapter,
        tmp_path / "cut",
        lambda tensors: {key.replace("model.model.model.", "model.model."): tensors[key] for key in tensors},
        file="adapter_model.safetensors",
    )
    report = project_adapter(cut, aligned=folders[0], base=folders[1], output=tmp_path / "out", select="all")
    assert not any("backbone" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert report.adapters[0].notes


def test_backbone_without_transformers(tmp_path, monkeypatch):
    """Nemotron-H calls its decoder `backbone` on disk and `model` in memory. Pairing them needs no table."""
    save(made("nemotron_h", 1), tmp_path / "model")
    monkeypatch.setattr(conversions, "conversions", lambda _: {})
    names = TensorNames(open_checkpoint(tmp_path / "model", role="base"), "base")
    (piece,) = names.weight("model.layers.0.mixer.in_proj")
    assert piece.tensor == "backbone.layers.0.mixer.in_proj.weight"


def test_a_table_that_is_asked_in_another_way_is_one_line(tmp_path, monkeypatch):
    """The table is private to transformers, so a later version may change the parameters of a function."""
    save(made("exaone", 1), tmp_path / "model")
    monkeypatch.setattr(core_model_loading, "rename_source_key", lambda name: name)
    names = TensorNames(open_checkpoint(tmp_path / "model", role="base"), "base")
    words = rf"transformers {re.escape(transformers.__version__)} gives .* cannot be found out \(TypeError: .*another version"
    with pytest.raises(PairingError, match=words) as refused:
        names.weight("model.layers.0.self_attn.q_proj")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("config", [{}, {"model_type": "llama"}, {"model_type": "no_such", "architectures": ["No"]}])
def test_the_table_is_left_alone_where_it_says_nothing(tmp_path, monkeypatch, config):
    """Importing transformers takes seconds, so it is imported only for a model that the table names."""
    save(small_model("llama", "LlamaForCausalLM", 1), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(conversions, "_without_weights", lambda _: pytest.fail("a model was made"))
    names = TensorNames(open_checkpoint(tmp_path / "model", role="base"), "base")
    with pytest.raises(PairingError, match=r"has no tensor model\.layers\.7"):
        names.weight("model.layers.7.self_attn.q_proj")


@pytest.mark.parametrize(
    "setting",
    [{"hidden_size": "wide"}, {"num_hidden_layers": 10**7}, {"vocab_size": 10**12}, {"architectures": None}],
    ids=str,
)
@pytest.mark.parametrize("model_type", ["exaone", "mixtral"])
def test_a_configuration_that_makes_no_model(tmp_path, model_type, setting):
    """The table's entry for the model type is enough for names."""
    save(made(model_type, 1), tmp_path / "model")
    model = type(made(model_type, 1)).from_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **setting}))
    checkpoint = open_checkpoint(tmp_path / "model", role="base")
    assert conversions._without_weights(checkpoint) is None
    names = TensorNames(checkpoint, "base")
    for name, weight, embedding in linears(model):
        assert torch.equal(
            read(matrix_of(names, names.weight(name), name, tuple(weight.shape), embedding=embedding)), weight
        )
    table = conversions.conversions(checkpoint)
    for name, key, stacked in experts(model):
        assert len(table[f"{name}.{key}"].matrices) == len(stacked)
