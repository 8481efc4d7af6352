"""Expert adapters whose adapter_config.json names the parameters in several spellings, as PEFT 0.21 writes them."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from families import EXPERTS, FAMILIES, Family, adapt, check_projection, project, rewrite, save
from safetensors.torch import load_file

from safelora_fast.errors import PairingError

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),  # PEFT wrote them itself
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),  # PEFT 0.18, for experts
]

FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
LATENT = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
MADE = {
    "mixtral": FAMILIES["mixtral"],
    "qwen2_moe": FAMILIES["qwen2_moe"],
    "gpt_oss": FAMILIES["gpt_oss"],
    "qwen3_moe": Family(transformers.Qwen3MoeConfig, [], {"num_experts": 3, "head_dim": 8, **FEW}, EXPERTS),
    "qwen3_next": Family(
        transformers.Qwen3NextConfig,
        [],
        {"num_experts": 3, "head_dim": 8, "shared_expert_intermediate_size": 20, **FEW, **LINEAR_ATTENTION},
        EXPERTS,
    ),
    "deepseek_v3": Family(transformers.DeepseekV3Config, [], {**FEW, **LATENT}, EXPERTS),
    "minimax": Family(
        transformers.MiniMaxConfig,
        [],
        {"num_local_experts": 3, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        EXPERTS,
    ),
}


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[1:], None], ids=["both", "down", "none"])
@pytest.mark.parametrize("family", MADE)
def test_all_linear(tmp_path, family, parameters):
    made = MADE[family]
    known = [parameter for parameter in parameters or [] if parameter in made.experts] or None
    config = {"target_modules": "all-linear", "target_parameters": known}
    check_projection(tmp_path, (made.make(1), made.make(2)), config)


@pytest.fixture
def qwen(tmp_path):
    """Return the folders of both models, and an adapter of one or both expert parameters, each named once."""
    made = FAMILIES["qwen2_moe"]
    if not made.experts:
        pytest.skip("this transformers keeps each expert as modules of its own")
    folders = save(made.make(1), tmp_path / "aligned"), save(made.make(2), tmp_path / "base")
    return folders, save(
        adapt(made.make(1), target_modules=["q_proj"], target_parameters=EXPERTS), tmp_path / "adapter"
    )


@pytest.mark.parametrize("more", [["gate_up_proj", "down_proj"], ["experts.down_proj"], ["gate.weight", "down_proj"]])
def test_a_parameter_that_is_named_twice(qwen, tmp_path, more):
    folders, adapter = qwen
    twice = rewrite(
        adapter, tmp_path / "twice", config={"target_parameters": [*EXPERTS, *more]}, file="adapter_model.safetensors"
    )
    results = [project([each], *folders, tmp_path / f"{name}") for name, each in (("once", adapter), ("two", twice))]
    (once,), (two,) = (
        [load_file(result.folder / "adapter_model.safetensors") for result in found] for found in results
    )
    assert once.keys() == two.keys()
    assert all(torch.equal(once[key], two[key]) for key in once)


def test_more_pairs_than_parameters(qwen, tmp_path):
    folders, adapter = qwen
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": EXPERTS[1:]}))
    with pytest.raises(PairingError, match=r"2 pairs of factors there, but target_parameters names down_proj only"):
        project([adapter], *folders, tmp_path / "output")
