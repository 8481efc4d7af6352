"""A tiny model with a character tokenizer and a chat template, used instead of the demo's 135M model."""

from __future__ import annotations

import string

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<unknown>", "<user>", "<assistant>"]


def tokenizer() -> PreTrainedTokenizerFast:
    characters = [*SPECIAL, *(c for c in string.printable if c not in "\r\x0b\x0c"), *"–—‘’“”é"]
    core = Tokenizer(models.WordLevel({c: index for index, c in enumerate(characters)}, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    words = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unknown>",
        additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    words.chat_template = TEMPLATE
    return words


def save_tiny(folder, seed: int = 0, layers: int = 2):
    """Save a model and its tokenizer in a folder."""
    words = tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
