"""Checks of a model's JSON files, before other libraries read them.

A huge size or a deeply nested file would exhaust memory or the stack there and end the process without an exception.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safelora_fast.files.json_reader import (
    COUNT,
    FLAG,
    NUMBER,
    OBJECT,
    TOKENS,
    Kind,
    check_fields,
    is_file,
    read_object,
    why,
)

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = "config.json"
FILES = (CONFIG, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PADDING = Kind("a token, or -1 for none", lambda value: value == -1 or TOKENS.fits(value))  # -1: in early Llama models
IDS = {**dict.fromkeys(("bos_token_id", "eos_token_id"), TOKENS), "pad_token_id": PADDING}
GENERATION = {
    **IDS,
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty"), NUMBER),
    **dict.fromkeys(
        ("top_k", "max_length", "max_new_tokens", "min_length", "num_beams", "no_repeat_ngram_size"), COUNT
    ),
    **dict.fromkeys(("do_sample", "use_cache"), FLAG),
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SIDES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "n_embd",
    "d_model",
    "d_ff",
    "head_dim",
    "max_position_embeddings",
)
HEADS = ("num_attention_heads", "num_key_value_heads", "n_head", "num_local_experts", "num_experts", "n_routed_experts")
MOST = {**dict.fromkeys(LAYERS, 10_000), **dict.fromkeys(SIDES, 1 << 27), **dict.fromkeys(HEADS, 100_000)}
MOST_VALUES = 1 << 37  # in the embeddings: half a terabyte


def refused_file(folder: Path) -> str | None:
    """Return why a JSON file of a model or adapter is unsafe for other libraries to read, or None."""
    for name in FILES:
        path = folder / name
        if not is_file(path):
            continue
        try:
            content = read_object(path)
            if name == "generation_config.json":
                check_fields(content, {}, GENERATION)
            if name == CONFIG:
                _check_sizes(content)
                check_fields(content, {}, {"text_config": OBJECT, **IDS})
                _check_sizes(content.get("text_config") or {})
        except (OSError, ValueError) as error:
            return f"{path}: {why(error)}"
    return None


def _check_sizes(config: dict[str, Any]) -> None:
    for name, most in MOST.items():
        value = config.get(name)
        if isinstance(value, int) and not (COUNT.fits(value) and value <= most):
            raise ValueError(f"{name} is {value:.4g}, which no model has; it must be from 0 to {most:,}")
    vocabulary, hidden = config.get("vocab_size"), config.get("hidden_size")
    if COUNT.fits(vocabulary) and COUNT.fits(hidden) and vocabulary * hidden > MOST_VALUES:  # type: ignore[operator]
        raise ValueError(f"vocab_size {vocabulary:,} by hidden_size {hidden:,} are embeddings that no model has")
