"""Byte and word tokenizers with control tokens, and common kinds of chat templates."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<think>", "</think>"]
HARMONY_CONTROL = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (  # Mistral: a BOS token, no header before the completion
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace("assistant\n'", "assistant\n<think>\n'")  # DeepSeek-R1: the prompt opens <think>
STRIPPING = CHATML.replace("m.content", "m.content.split('</think>')[-1].lstrip()")  # and strips thoughts from answers
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(
    template: str | None = CHATML, *, eos="<|im_end|>", bos=None, adds_bos=False, more=(), cls=PreTrainedTokenizerFast
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, plus the control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([*CONTROL, *more])
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
        )
    named = {key: value for key, value in {"eos_token": eos, "bos_token": bos}.items() if value}
    fast = cls(tokenizer_object=inner, pad_token="<|endoftext|>", **named)
    fast.chat_template = template
    return fast


def word_tokenizer(words, template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word. White space has no token, so some text positions belong to none."""
    inner = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(["<pad>", *words])}, unk_token="<pad>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(CONTROL)
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<pad>")
    fast.chat_template = template
    return fast
