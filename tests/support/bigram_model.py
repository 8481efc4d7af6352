"""A model whose next token depends only on the last one, so its output is known in advance."""

from __future__ import annotations

import torch
from demo_model import tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM


def save_bigram(folder, successors: dict[str, str]):
    """Save a model that generates `successors[token]` after a token, and ends its turn after all other tokens.

    This works at every temperature up to 1. The layers add nothing, so the head's input is the last token's embedding,
    a unit vector.
    """
    words = tokenizer()
    count = len(words)
    config = LlamaConfig(
        vocab_size=count, hidden_size=count + count % 2, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=4096, tie_word_embeddings=False, pad_token_id=0, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    embedding, head, (layer,) = model.get_input_embeddings().weight, model.lm_head.weight, model.model.layers
    with torch.no_grad():
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, head):
            weight.zero_()
        embedding.copy_(torch.eye(count, config.hidden_size))
        for token in words.get_vocab():
            after = successors.get(token, words.eos_token)
            head[words.convert_tokens_to_ids(after), words.convert_tokens_to_ids(token)] = 10
    model.generation_config = GenerationConfig(eos_token_id=words.eos_token_id, pad_token_id=0, do_sample=True)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
