"""Small random models of any transformers family, made by reducing the sizes in its default configuration."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn

HIDDEN = (
    "hidden_size",
    "d_model",
    "embed_dim",
    "projection_dim",
    "out_hidden_size",
    "text_hidden_size",
    "vision_hidden_size",
)
INNER = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "mlp_dim")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers", "depth")
HEADS = (
    "num_attention_heads",
    "n_head",
    "num_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "mamba_num_heads",
)
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")
WIDTH = (
    "head_dim",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
)
SMALL = {
    **dict.fromkeys(HIDDEN, 32),
    **dict.fromkeys(INNER, 24),
    **dict.fromkeys(LAYERS, 2),
    **dict.fromkeys((*HEADS, *EXPERTS), 4),
    **dict.fromkeys(WIDTH, 8),
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "image_size": 16,
    "patch_size": 4,
    "num_mel_bins": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "first_k_dense_replace": 1,
    "max_source_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small_config(model_type: str) -> transformers.PretrainedConfig:
    """Return the default configuration of a family with small sizes, also in nested configurations."""
    kind = transformers.CONFIG_MAPPING[model_type]
    default = kind()
    settings: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, transformers.PretrainedConfig):
            settings[name] = _shrunk(value).to_dict()
        elif name in SMALL and isinstance(value, int):
            settings[name] = SMALL[name]
    return _shrunk(kind(**settings))


def _shrunk(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            _shrunk(value)
        elif name in SMALL and isinstance(value, int):
            setattr(config, name, SMALL[name])
        elif name == "layer_types" and value:
            config.layer_types = (list(dict.fromkeys(value)) * 2)[:2]
    return config


def small_model(model_type: str, class_name: str, seed: int) -> transformers.PreTrainedModel:
    """Create a model of a class with random weights."""
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(small_config(model_type))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def read(matrix):
    """Read a matrix as the projection streams it, [out, in]."""
    rows = []
    for block in matrix.blocks:
        with safe_open(block.file.path, "pt") as file:
            flat = file.get_tensor(block.tensor).reshape(-1)
        rows.append(flat[block.offset : block.offset + block.rows * block.cols].reshape(block.rows, block.cols))
    whole = torch.cat(rows)
    return whole.T if matrix.transposed else whole


def linears(model):
    """Yield (name, weight, is_embedding) of linear layers and embeddings, oriented as an adapter's ΔW."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.dim() == 2:
            weight = module.weight.detach()
            yield name, weight.T if isinstance(module, nn.Embedding) else weight, isinstance(module, nn.Embedding)


def experts(model):
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            yield from (
                (name, key, value.detach()) for key, value in module.named_parameters(recurse=False) if value.dim() == 3
            )
