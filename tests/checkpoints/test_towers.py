"""Adapters of one tower of a model with several. The model's class names the tower; otherwise nothing is projected."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import adapt, assert_projected, check_projection, project, rewrite, save, weights

from safelora_fast.checkpoints.tensor_names import NameIndex, tower_of, tower_of_class
from safelora_fast.errors import PairingError
from safelora_fast.subspace.module_subspace import ModuleSubspace
from safelora_fast.subspace.safe_subspace import SafeSubspace

SIDE = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {
    **SIDE,
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {**SIDE, "image_size": 8, "patch_size": 4}
AUDIO = {
    "hidden_size": 32,
    "patch_embeds_hidden_size": 16,
    "depths": [1, 1],
    "num_attention_heads": [2, 4],
    "spec_size": 16,
    "num_mel_bins": 4,
    "patch_size": 4,
    "patch_stride": [4, 4],
    "window_size": 2,
    "num_hidden_layers": 2,
    "enable_fusion": False,
}
FLAVA = {"image_config": VISION, "text_config": TEXT, "multimodal_config": SIDE}
CLIP = {"text_config": TEXT, "vision_config": VISION}
ATTENTION = ["q_proj", "fc1"]
BERT = ["query", "dense"]
# The class of the whole model, its settings, the attribute of one tower, and the modules that the adapter targets.
TOWERS = {
    "clip-vision": ("CLIPModel", CLIP, "vision_model", ATTENTION),
    "clip-text": ("CLIPModel", CLIP, "text_model", ATTENTION),
    "siglip-vision": ("SiglipModel", CLIP, "vision_model", ATTENTION),
    "siglip-text": ("SiglipModel", CLIP, "text_model", ATTENTION),
    "clipseg-vision": ("CLIPSegModel", CLIP, "vision_model", ATTENTION),
    "clipseg-text": ("CLIPSegModel", CLIP, "text_model", ATTENTION),
    "metaclip-2-vision": ("MetaClip2Model", CLIP, "vision_model", ATTENTION),
    "metaclip-2-text": ("MetaClip2Model", CLIP, "text_model", ATTENTION),
    "blip-vision": ("BlipModel", CLIP, "vision_model", ["qkv", "fc1"]),
    "blip-text": ("BlipModel", CLIP, "text_model", BERT),
    "flava-image": ("FlavaModel", FLAVA, "image_model", BERT),
    "flava-text": ("FlavaModel", FLAVA, "text_model", BERT),
    "flava-multimodal": ("FlavaModel", FLAVA, "multimodal_model", BERT),
    "clap-audio": ("ClapModel", {"text_config": TEXT, "audio_config": AUDIO}, "audio_model", BERT),
    "clap-text": ("ClapModel", {"text_config": TEXT, "audio_config": AUDIO}, "text_model", BERT),
    "align-text": ("AlignModel", {"text_config": TEXT, "vision_config": {}}, "text_model", BERT),
}


def make(name, seed):
    owner, settings, tower, targets = TOWERS[name]
    if not hasattr(transformers, owner):
        pytest.skip(f"this transformers has no {owner}")
    config = getattr(transformers, owner.replace("Model", "Config"))(**settings)
    torch.manual_seed(seed)
    whole = getattr(transformers, owner)(config)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(std=0.2)
    return whole, getattr(whole, tower), {"target_modules": targets}


@pytest.mark.parametrize("name", TOWERS)
def test_the_class_tells_the_tower(tmp_path, name):
    (aligned, ours, target), (base, theirs, _) = make(name, 1), make(name, 2)
    folders = save(aligned, tmp_path / "aligned"), save(base, tmp_path / "base")
    base_weights, adapted = weights(adapt(theirs, **target)), adapt(ours, **target)
    (result,) = project([save(adapted, tmp_path / "adapter")], *folders, tmp_path / "output")
    assert_projected(result, adapted, base_weights)
    tower = TOWERS[name][2]
    assert all(source.aligned.startswith(f"{tower}.") for module in result.plan.modules for source in module.sources)


@pytest.mark.parametrize("name", ["clip-vision", "clip-text", "siglip-vision", "flava-image", "metaclip-2-text"])
def test_nothing_tells_the_tower(tmp_path, name):
    """PEFT omits the class if a task is given."""
    (aligned, ours, target), (base, *_) = make(name, 1), make(name, 2)
    folders = save(aligned, tmp_path / "aligned"), save(base, tmp_path / "base")
    adapter = save(adapt(ours, **target), tmp_path / "adapter")
    settings = {"auto_mapping": None, "task_type": "FEATURE_EXTRACTION"}
    adapter = rewrite(adapter, tmp_path / "other", config=settings, file="adapter_model.safetensors")
    with pytest.raises(PairingError, match=r"several tensors that may be meant: \w+_model\..*, \w+_model\..*class"):
        project([adapter], *folders, tmp_path / "output")


def test_an_adapter_of_the_whole_model(tmp_path):
    (aligned, _, target), (base, _, _) = make("clip-vision", 1), make("clip-vision", 2)
    check_projection(tmp_path, (aligned, base), target)


def test_a_tower_that_is_a_checkpoint_of_its_own(tmp_path):
    """For some towers, transformers writes `vision_model.` before the names. The loaded model has no such prefix."""
    vision = transformers.CLIPVisionConfig(**VISION)
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(transformers.CLIPVisionModel(vision))

    def prefixed(tensors):
        return {f"vision_model.{name.removeprefix('vision_model.')}": tensors[name] for name in tensors}

    check_projection(tmp_path, models, {"target_modules": ATTENTION}, (prefixed, prefixed))


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("CLIPVisionModel", "vision"),
        ("CLIPVisionModelWithProjection", "vision"),
        ("FlavaImageModel", "vision"),
        ("ClapAudioModel", "audio"),
        ("CLIPTextTransformer", "text"),
        ("FlavaMultimodalModel", "multimodal"),
        ("LlamaForCausalLM", "text"),
        ("CLIPModel", None),
        ("ViTModel", None),
        ("Qwen2AudioForConditionalGeneration", None),
    ],
)
def test_the_tower_of_a_class(name, tower):
    assert tower_of_class(name) == tower
    assert tower_of({"auto_mapping": {"base_model_class": name}, "task_type": None}) == tower


def test_names_of_two_towers():
    query = "layers.0.self_attn.q_proj.weight"
    llava = [f"model.vision_tower.vision_model.encoder.{query}", f"model.language_model.{query}"]
    assert NameIndex(llava).find(f"model.{query}") == [llava[1]]
    llama4 = [f"vision_model.model.{query}", f"language_model.model.{query}"]
    assert sorted(NameIndex(llama4).find(f"model.{query}")) == sorted(llama4)
    assert NameIndex(llama4).find(f"model.{query}", "text") == [llama4[1]]
    assert NameIndex(llama4).find(f"model.{query}", "vision") == [llama4[0]]
    assert NameIndex(llama4).find(f"model.language_model.{query}", "vision") == [llama4[1]]
    both = [f"encoder.encoder.{query}", f"decoder.bert.encoder.{query}"]
    assert sorted(NameIndex(both).find(f"encoder.{query}")) == sorted(both)
    assert NameIndex([f"model.{query}", f"mtp.{query}"]).find(query) == [f"model.{query}"]
    assert NameIndex([f"text_model.encoder.{query}"]).find(f"encoder.{query}", "vision") == []


def test_a_subspace_of_two_towers():
    query = "encoder.layers.0.self_attn.q_proj"
    modules = {
        f"{tower}_model.{query}": ModuleSubspace(torch.zeros(4, 1).numpy(), torch.ones(1).numpy(), size, 4)
        for tower, size in (("text", 1.0), ("vision", 2.0))
    }
    subspace = SafeSubspace(modules, {})
    with pytest.raises(PairingError, match="ambiguous"):
        subspace.find(query)
    assert [subspace.find(query, tower).v_norm for tower in ("text", "vision")] == [1.0, 2.0]
