"""Keys and values found in families that project, fuse and normalize them differently."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from small_models import small_config
from tiny_models import fill_adapter

from safelora_fast.errors import SettingsError
from safelora_fast.models.anatomy import dissect
from safelora_fast.models.attention_states import find_attention_states
from safelora_fast.models.capture import Tap

KEYS = {  # the last module that makes the keys of a layer, before rotary embedding
    "llama": "self_attn.k_proj",
    "qwen2": "self_attn.k_proj",
    "qwen3": "self_attn.k_norm",
    "gemma3_text": "self_attn.k_norm",
    "gemma4_text": "self_attn.k_norm",
    "olmo2": "self_attn.k_norm",
    "phi3": "self_attn.qkv_proj",
    "gpt_neox": "attention.query_key_value",
    "falcon": "self_attention.query_key_value",
    "persimmon": "self_attn.k_layernorm",
    "bloom": "self_attention.query_key_value",
    "gpt2": "attn.c_attn",
    "opt": "self_attn.k_proj",
    "gpt_oss": "self_attn.k_proj",
}
LEARNED_POSITIONS = {"gpt2", "opt"}
NO_POSITIONS = {"bloom"}  # takes no position_ids, so they are not compared


def small(model_type):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(small_config(model_type)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.train()


@pytest.mark.parametrize("model_type", [name for name in KEYS if name in transformers.CONFIG_MAPPING])
def test_they_are_what_attention_sees(model_type):
    """At real positions the cache's values are equal, and its keys are rotated: each head keeps its length."""
    model = small(model_type)
    anatomy = dissect(model)
    states, absolute = find_attention_states(model, anatomy, None, owner="test")
    assert [(state.layer, state.kind) for state in states] == [(i, k) for i in (0, 1) for k in ("keys", "values")]
    assert states[0].module == KEYS[model_type]
    assert absolute == (model_type in LEARNED_POSITIONS | NO_POSITIONS)
    assert model.training

    tap = Tap(anatomy, [])
    modules = [anatomy.layers[state.layer].get_submodule(state.module) for state in states]
    names = [f"{state.kind}{state.layer}" for state in states]
    picks = zip(modules, [state.read for state in states], strict=True)
    tap.attach(dict(zip(names, picks, strict=True)))
    capture, ids = tap.begin(), torch.tensor([[7, 3, 9, 4, 6, 5], [8, 3, 7, 11, 2, 9]])
    with torch.no_grad():
        output = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    cache = output.get("past_key_values") or output["cache"]
    for state, name in zip(states, names, strict=True):
        cached = getattr(cache.layers[state.layer], state.kind)  # [batch, heads, tokens, width]
        found = capture.picked[name].unflatten(2, (cached.shape[1], -1)).transpose(1, 2)
        if state.kind == "keys":
            found, cached = (part.norm(dim=-1) / part.norm() for part in (found, cached))  # YaRN multiplies all of them
        torch.testing.assert_close(found, cached, rtol=1e-4, atol=1e-5)


def test_the_adapter_is_inside():
    """Also where it adapts the fused projection, and before the norm of the keys."""
    for model_type, target in (("phi3", "qkv_proj"), ("qwen3", "k_proj")):
        model = get_peft_model(small(model_type), LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM"))
        states, _ = find_attention_states(model, dissect(model), [1], owner="test")
        fill_adapter(model, seed=1)
        assert find_attention_states(model, dissect(model), [1], owner="test")[0][0].module == states[0].module
        assert states[0].module == KEYS[model_type]
    assert find_attention_states(model, dissect(model), [0], owner="test")[0][0].layer == 0


def test_what_cannot_be_found_is_refused():
    sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
    model = transformers.CodeGenForCausalLM(
        transformers.CodeGenConfig(**sizes)
    )  # its fused projection has its own order
    with pytest.raises(
        SettingsError, match="keys and values of layer 0 of CodeGenForCausalLM are not the output of a mod"
    ):
        find_attention_states(model, dissect(model), None, owner="test")
