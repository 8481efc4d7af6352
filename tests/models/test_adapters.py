"""Attaching adapters: the model computes what was trained, for all forms of keys and vocabulary sizes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, tiny_model
from transformers import AutoModelForImageTextToText, LlamaConfig, LlavaConfig, SiglipVisionConfig

from safelora_fast.errors import AdapterError
from safelora_fast.models.adapters import fit_adapter, put_adapter

WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."
IDS = torch.tensor([[5, 9, 3, 12, 40]])
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tie:UserWarning", "ignore:.*tied:UserWarning", "ignore:.*embedding:UserWarning"
)


def trained(folder, model, **lora):
    """Save an adapter with random weights and return the logits of the model with it."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **lora}
    adapted = get_peft_model(model, LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return logits(adapted)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def put(folder, **settings):
    """Return the logits of a new model with the adapter of a folder."""
    return logits(put_adapter(tiny_model(layers=2, **settings), folder))


def rename(folder, change, **config):
    tensors = {change(key): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return folder


PATTERNS = {
    "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 3},
    "alpha_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 5},
    "layers_to_transform": [1],
}


@pytest.mark.parametrize(
    "lora",
    [{}, PATTERNS, {"use_rslora": True}, {"modules_to_save": ["norm"]}, {"use_dora": True}],
    ids=lambda lora: str([*lora]),
)
@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
        lambda key: key.replace(f"{PREFIX}model.", f"{PREFIX}language_model.model."),
        lambda key: key.replace(f"{PREFIX}model.", PREFIX),
        lambda key: key.removeprefix(PREFIX),
        lambda key: key.replace(PREFIX, f"{PREFIX}model."),
    ],
    ids=["model.language_model", "language_model.model", "backbone", "no prefix", "twice"],
)
def test_names_of_another_class_are_paired(tmp_path, change, lora):
    truth = trained(tmp_path, tiny_model(layers=2), **lora)
    assert torch.equal(put(rename(tmp_path, change)), truth)


def test_whole_names_as_targets_are_paired(tmp_path):
    """ms-swift and unsloth write them this way."""
    name = "model.language_model.layers"
    truth = trained(tmp_path, tiny_model(layers=2), target_modules=r"model\.layers\.\d\.self_attn\.(q|v)_proj")
    rename(
        tmp_path, lambda key: key.replace("model.layers", name), target_modules=rf"{name}\.\d\.self_attn\.(q|v)_proj"
    )
    assert torch.equal(put(tmp_path), truth)


def tiny_llava():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)
    vision = SiglipVisionConfig(image_size=16, patch_size=8, **sizes)
    return AutoModelForImageTextToText.from_config(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=VOCABULARY - 1)
    ).eval()


def test_a_text_adapter_on_the_class_with_a_vision_tower(tmp_path):
    """The vision tower has layers with the same names and shapes."""
    targets = r".*language_model\.layers\.\d\.self_attn\.(q|v)_proj"
    truth = trained(tmp_path, tiny_llava(), target_modules=targets)
    rename(tmp_path, lambda key: key.replace("model.language_model.", "model."), target_modules=["q_proj", "v_proj"])
    assert torch.equal(logits(put_adapter(tiny_llava(), tmp_path)), truth)


def longer(tokens=2, **settings):
    model = tiny_model(layers=2, **settings)
    model.resize_token_embeddings(VOCABULARY + tokens, mean_resizing=False)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize(
    ("tokens", "lora"),
    [
        (2, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (3, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        (-4, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
    ids=["modules_to_save", "LoRA on both", "fewer"],
)
def test_added_tokens(tmp_path, tokens, lora, tied):
    truth = trained(tmp_path, longer(tokens, tie_word_embeddings=tied), **lora)
    found = put(tmp_path, tie_word_embeddings=tied)
    assert found.shape[-1] == VOCABULARY + tokens
    assert torch.equal(found, truth)


def saved_with_embeddings(folder, model, **lora):
    model.config._name_or_path = ""
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **lora)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    adapted.save_pretrained(folder, save_embedding_layers=True)
    return logits(adapted)


def test_embeddings_that_were_resized_and_saved_along(tmp_path):
    truth = saved_with_embeddings(tmp_path, longer())
    assert torch.equal(put(tmp_path), truth)


def test_trainable_tokens_among_those_that_are_there(tmp_path):
    truth = trained(tmp_path, tiny_model(layers=2), trainable_token_indices=[3, 9])
    assert torch.equal(put(tmp_path), truth)


def test_trainable_tokens_that_were_added_to_tied_embeddings(tmp_path):
    truth = trained(tmp_path, longer(tie_word_embeddings=True), trainable_token_indices=[VOCABULARY, VOCABULARY + 1])
    assert torch.equal(put(tmp_path, tie_word_embeddings=True), truth)


def without(folder, ending):
    tensors = load_file(folder / WEIGHTS)
    save_file({key: tensor for key, tensor in tensors.items() if not key.endswith(ending)}, folder / WEIGHTS)


def test_added_tokens_that_the_adapter_does_not_hold_are_refused(tmp_path):
    saved_with_embeddings(tmp_path, longer())
    without(tmp_path, "lm_head.weight")
    with pytest.raises(AdapterError, match=r"trained with 63 tokens, but the model has 61.*lm_head\.weight"):
        put_adapter(tiny_model(layers=2), tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"hidden_size": 64},
            r"q_proj\.lora_A\.weight is \[4, 32\], but .*q_proj of this model is \[64, 64\]|lora_B.* is \[",
        ),
        ({"intermediate_size": 50}, r"down_proj\.lora_A\.weight is \[4, 48\], but model\..*down_proj .* \[32, 50\]"),
        ({"layers": 1}, r"modules that this model does not have, e\.g\. .*layers\.1\..*trained on another one"),
    ],
    ids=str,
)
def test_a_misfit_is_found_without_weights(tmp_path, model, message):
    trained(tmp_path, tiny_model(layers=2))
    with torch.device("meta"):
        other = tiny_model(**{"layers": 2, **model})
    with pytest.raises(AdapterError, match=message):
        fit_adapter(tmp_path, other)


def test_a_weight_of_packed_bytes_tells_nothing_of_shapes(tmp_path):
    """bitsandbytes stores a 4-bit weight as one column of bytes."""
    model = tiny_model(layers=2)
    trained(tmp_path, tiny_model(layers=2))
    for layer in model.model.layers:
        packed = torch.zeros(layer.mlp.down_proj.weight.numel() // 2, 1, dtype=torch.uint8)
        layer.mlp.down_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    assert len(fit_adapter(tmp_path, model).modules) == 4


def test_a_tensor_of_no_factors_that_does_not_fit_is_refused(tmp_path):
    trained(tmp_path, tiny_model(layers=2), modules_to_save=["norm"])
    tensors = load_file(tmp_path / WEIGHTS)
    cut = {key: tensor[:7] if key.endswith("norm.weight") else tensor for key, tensor in tensors.items()}
    save_file(cut, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=r"norm\.weight is \[7\], but .*norm of this model is \[32\]"):
        fit_adapter(tmp_path, tiny_model(layers=2))


def test_a_rank_that_is_not_that_of_the_configuration(tmp_path):
    trained(tmp_path, tiny_model(layers=2))
    rename(tmp_path, str, r=8)
    with pytest.raises(
        AdapterError, match=r"lora_A\.default\.weight is \[4, .*\] in the file, but \[8, .*\] in the model \(and 7 more"
    ):
        put_adapter(tiny_model(layers=2), tmp_path)


def test_another_adapter_on_a_peft_model(tmp_path):
    first = trained(tmp_path / "first", tiny_model(layers=2))
    second = trained(tmp_path / "second", tiny_model(layers=2), target_modules=["v_proj"])
    rename(tmp_path / "second", lambda key: key.replace("model.layers", "model.language_model.layers"))
    model = tiny_model(layers=2)
    fits = [fit_adapter(tmp_path / name, model) for name in ("first", "second")]
    adapted = put_adapter(model, tmp_path / "first", name="first", fit=fits[0])
    adapted = put_adapter(adapted, tmp_path / "second", name="second", fit=fits[1])
    for name, truth in (("first", first), ("second", second)):
        adapted.set_adapter(name)
        assert torch.equal(logits(adapted), truth)


def test_what_belongs_to_the_adapter_alone_does_not_stand_for_the_models_own_weights(tmp_path):
    trained(tmp_path, tiny_model(layers=2), use_dora=True, trainable_token_indices=[3])
    assert fit_adapter(tmp_path, tiny_model(layers=2)).full == {}


def test_the_adapters_own_folder_is_left_alone(tmp_path):
    trained(tmp_path / "adapter", tiny_model(layers=2))
    rename(tmp_path / "adapter", lambda key: key.removeprefix(PREFIX))
    shutil.copytree(tmp_path / "adapter", tmp_path / "before")
    put_adapter(tiny_model(layers=2), tmp_path / "adapter")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "adapter" / file.name).read_bytes()
