"""End-to-end tests on each model family: PEFT adapters, transformers checkpoints, and a dense float64 oracle."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from families import FAMILIES, Family, adapt, assert_projected, project, randomize, rewrite, save, weights
from peft import LoraConfig
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


def pair(tmp_path, family, **settings):
    """Return a family's aligned and base models with their folders."""
    made = FAMILIES[family] if isinstance(family, str) else family
    models = made.make(1, **settings), made.make(2, **settings)
    return models, (save(models[0], tmp_path / "aligned"), save(models[1], tmp_path / "base"))


def check(tmp_path, family, *, settings=None, tolerance=1e-5, **config):
    """Project an adapter of a family, and compare the result with the dense formula."""
    made = FAMILIES[family] if isinstance(family, str) else family
    (aligned, base), folders = pair(tmp_path, made, **(settings or {}))
    config = {**made.target, **config}
    base_weights = weights(adapt(base, **config))
    adapted = adapt(aligned, **config)
    adapter = save(adapted, tmp_path / "adapter")
    (result,) = project([adapter], *folders, tmp_path / "output")
    assert_projected(result, adapted, base_weights, tolerance=tolerance)
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path, family):
    result = check(tmp_path, family)
    files = {(module.sources[0].aligned_file, module.sources[0].base_file) for module in result.plan.modules}
    assert files == {tuple(str(tmp_path / role / "model.safetensors") for role in ("aligned", "base"))}


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_several_shards_are_read_in_the_order_of_their_bytes(tmp_path, family):
    made = FAMILIES[family]
    aligned, base = made.make(1), made.make(2)
    aligned.save_pretrained(tmp_path / "aligned", max_shard_size="20KB")
    folders = tmp_path / "aligned", save(base, tmp_path / "base")
    base_weights, adapted = weights(adapt(base, **made.target)), adapt(aligned, **made.target)
    (result,) = project([save(adapted, tmp_path / "adapter")], *folders, tmp_path / "output")
    assert_projected(result, adapted, base_weights)
    files = [module.sources[0].aligned_file for module in result.plan.modules]
    assert len(set(files)) > 2
    assert files == sorted(files)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"k_proj": 32}},
        {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"target_modules": "all-linear"},
        {"target_modules": ["lm_head"]},
        {"trainable_token_indices": [3, 5]},
    ],
    ids="-".join,
)
@pytest.mark.filterwarnings("ignore:Adapter .default.. 6 LoRA tensor:Warning")  # PEFT takes its own biases for shards
def test_settings_of_peft(tmp_path, config):
    check(tmp_path, "qwen2", **config)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_embeddings(tmp_path, family):
    names = {"llama": ["embed_tokens", "q_proj"], "opt": ["embed_tokens", "fc1"], "gpt2": ["wte", "c_fc"]}
    result = check(tmp_path, family, target_modules=names[family], fan_in_fan_out=family == "gpt2")
    embedding = next(module for module in result.plan.modules if module.group.factors[0].module.kind == "embedding")
    assert embedding.group.factors[0].lora_b.key.endswith("lora_embedding_B")


@pytest.mark.parametrize("spelled", [True, False])
def test_tied_head(tmp_path, spelled):
    (aligned, base), folders = pair(tmp_path, "gemma")
    adapted = adapt(aligned, target_modules=["lm_head", "q_proj"])
    base_weights = weights(adapt(base, target_modules=["lm_head", "q_proj"]))
    if not spelled:
        config = json.loads((folders[1] / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (folders[1] / "config.json").write_text(json.dumps(config))
    (result,) = project([save(adapted, tmp_path / "adapter")], *folders, tmp_path / "output")
    assert_projected(result, adapted, base_weights)
    head = next(module for module in result.plan.modules if module.name == "lm_head")
    assert head.sources[0].aligned == head.sources[0].base == "model.embed_tokens.weight"


def test_square_conv1d_is_transposed(tmp_path):
    """GPT-2's attn.c_proj is square, so only the model type shows that it is stored as (in, out)."""
    result = check(tmp_path, "gpt2", settings={"n_inner": 32})
    square = [module for module in result.plan.modules if module.name.endswith(("attn.c_proj", "mlp.c_fc"))]
    assert len(square) == 4


def test_square_linear_is_not_transposed_by_a_wrong_fan_in_fan_out(tmp_path):
    """PEFT corrects the setting for Linear when it builds the model, but an adapter may keep the user's value."""
    (aligned, base), folders = pair(tmp_path, "llama")
    adapted, base_weights = adapt(aligned, target_modules=["q_proj"]), weights(adapt(base, target_modules=["q_proj"]))
    adapter = save(adapted, tmp_path / "adapter")
    wrong = rewrite(adapter, tmp_path / "wrong", config={"fan_in_fan_out": True}, file="adapter_model.safetensors")
    (result,) = project([wrong], *folders, tmp_path / "output")
    (right,) = project([adapter], *folders, tmp_path / "right")
    assert_projected(right, adapted, base_weights)
    assert (result.folder / "adapter_model.safetensors").read_bytes() == (
        right.folder / "adapter_model.safetensors"
    ).read_bytes()


def test_adapters_share_a_job(tmp_path):
    (aligned, base), folders = pair(tmp_path, "mistral")
    base_weights = weights(adapt(base, target_modules=["q_proj", "o_proj", "down_proj"]))
    adapted = adapt(aligned, target_modules=["q_proj", "o_proj"])
    adapted.add_adapter("other", LoraConfig(r=3, target_modules=["o_proj", "down_proj"]))
    adapted.set_adapter("other")
    randomize(adapted, 11)
    adapted.save_pretrained(tmp_path / "adapter")
    folders_of_adapters = [tmp_path / "adapter", tmp_path / "adapter" / "other"]
    results = project(folders_of_adapters, *folders, tmp_path / "output")
    assert_projected(results[0], adapted, base_weights, name="default")
    assert_projected(results[1], adapted, base_weights, name="other")
    counts = {module.name.rpartition(".")[2]: len(module.group.factors) for module in results[0].plan.modules}
    assert counts == {"q_proj": 1, "o_proj": 2, "down_proj": 1}


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.float16, torch.bfloat16])
def test_dtypes_may_differ(tmp_path, adapter_dtype, base_dtype):
    made = FAMILIES["llama"]
    aligned, base = made.make(1).to(torch.bfloat16), made.make(2).to(base_dtype)
    folders = save(aligned, tmp_path / "aligned"), save(base, tmp_path / "base")
    base_weights, adapted = weights(adapt(base, **made.target)), adapt(aligned, **made.target)
    adapted = adapted.to(adapter_dtype)
    (result,) = project([save(adapted, tmp_path / "adapter")], *folders, tmp_path / "output")
    stored = load_file(result.folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {adapter_dtype}
    assert_projected(result, adapted, base_weights, tolerance=TOLERANCE[adapter_dtype])


def test_a_family_without_its_own_class_of_names(tmp_path):
    """A family without special handling is paired by the same rules."""
    family = Family(transformers.GPTNeoXConfig, ["query_key_value", "dense"], {"num_attention_heads": 4})
    check(tmp_path, family, target_modules=["query_key_value", "dense", "embed_out"])
