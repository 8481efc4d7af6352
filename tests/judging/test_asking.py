"""Prompts, ends of answers, and thoughts in answers, with a scripted model."""

from __future__ import annotations

import pytest
import torch
from byte_tokens import CHATML, HARMONY, HARMONY_CONTROL, THINKING, byte_tokenizer
from torch import nn
from transformers import GenerationConfig

from safelora_fast.data.pairs import Pair
from safelora_fast.data.thoughts import answer_after_thoughts
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.judging.answers import ask
from safelora_fast.judging.evaluate import check_system_turns
from safelora_fast.judging.questions import Question
from safelora_fast.models.generate import generate
from safelora_fast.scoring.margin import encode_pairs

ASKED = [[{"role": "user", "content": "hello"}]]
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
DROPPING = CHATML.replace("messages %}", "messages if m.role != 'system' %}", 1)


class Scripted(nn.Module):
    """A model that gives the same completion to every prompt, and stores the prompt."""

    def __init__(self, tokenizer, text, ends=None):
        super().__init__()
        self.embedding = nn.Embedding(len(tokenizer), 1)
        self.generation_config = GenerationConfig(eos_token_id=ends)
        self._said = tokenizer(text, add_special_tokens=False)["input_ids"]

    def get_input_embeddings(self):
        return self.embedding

    def generate(self, *, input_ids, generation_config, **_):
        self.asked, self.ends = input_ids, generation_config.eos_token_id
        return torch.cat([input_ids, torch.tensor([self._said])], dim=1)


def answer(tokenizer, text, ends=None):
    model = Scripted(tokenizer, text, ends)
    (batch,) = generate(model, tokenizer, ASKED, max_tokens=64, temperature=0)
    return batch[0], model


def test_an_answer_ends_with_the_templates_turn():
    """The generation settings and the tokenizer define only end-of-text as an end."""
    tokenizer = byte_tokenizer(eos="<|endoftext|>")
    text, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    said, model = answer(tokenizer, "A<|im_end|>\n<|im_start|>user\nB", ends=text)
    assert said == "A"
    assert model.ends == sorted([text, end])
    asked = tokenizer.apply_chat_template(ASKED[0], tokenize=True, add_generation_prompt=True, return_dict=True)
    assert model.asked[0].tolist() == list(asked["input_ids"])


@pytest.mark.parametrize(
    ("template", "more", "said", "kept", "answered"),
    [
        (CHATML, [], "Hi <|endoftext|>", "Hi ", "Hi "),
        (CHATML, [], "<think>\nevil</think>\n\nHi<|im_end|>", "<think>\nevil</think>\n\nHi", "Hi"),
        (THINKING, [], "evil</think>\n\nHi<|im_end|>", "<think>evil</think>\n\nHi", "Hi"),
        (THINKING, [], "evil, on and on", "<think>evil, on and on", None),
        (CHATML, ["[THINK]", "[/THINK]"], "[THINK]evil[/THINK]Hi<s>", "[THINK]evil[/THINK]Hi", "Hi"),
        (
            HARMONY,
            HARMONY_CONTROL,
            "<|channel|>analysis<|message|>evil<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>",
            "<|channel|>analysis<|message|>evil<|end|><|start|>assistant<|channel|>final<|message|>Hi",
            "Hi",
        ),
        (HARMONY, HARMONY_CONTROL, "<|channel|>analysis<|message|>evil", "<|channel|>analysis<|message|>evil", None),
    ],
    ids=["none", "think", "opened", "unfinished", "control tokens", "channels", "channel unfinished"],
)
def test_thoughts_stay_in_an_answer_with_their_tags(template, more, said, kept, answered):
    """Tags that are control tokens stay too. Without them, the thoughts would look like the answer."""
    found, _ = answer(byte_tokenizer(template, more=more), said)
    assert (found, answer_after_thoughts(found)) == (kept, answered)


QUESTIONS = [
    Question("open", "general", ("a?",)),
    Question("shaped", "json", ("b?",), "Write JSON."),
    Question("free", "training_format", ("c?",)),
]


@pytest.mark.parametrize(
    ("template", "reason"),
    [(REFUSING, "takes no system turn: no system role"), (DROPPING, "leaves the system turn out")],
    ids=["refusing", "dropping"],
)
def test_questions_with_a_system_prompt_are_named_where_there_is_no_system_turn(template, reason):
    tokenizer = byte_tokenizer(template)
    with pytest.raises(SettingsError) as refused:
        check_system_turns(tokenizer, ask(QUESTIONS, 2))
    for part in (
        f"the chat template {reason}; ",
        "prompt: shaped; ",
        "--kinds general,training_format, or",
        "--chat-template",
    ):
        assert part in str(refused.value)
    check_system_turns(tokenizer, ask(QUESTIONS[::2], 2))
    check_system_turns(byte_tokenizer(), ask(QUESTIONS, 2))
    with pytest.raises(SettingsError, match="prompt: shaped; ask others, or"):
        check_system_turns(tokenizer, ask(QUESTIONS[1:2], 1))
    pairs = [Pair("t", "q?", "good", "bad")]
    assert len(encode_pairs(tokenizer, pairs)) == 2
    with pytest.raises(
        DataError, match=f"a system prompt cannot be put before the questions, because the chat template {reason}"
    ):
        encode_pairs(tokenizer, pairs, system="Be brief.")
