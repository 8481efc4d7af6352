"""Separating thoughts from answers, with the tags of several models."""

from __future__ import annotations

import pytest

from safelora_fast.data.thoughts import answer_after_thoughts, is_tag, opening_tag

PAIRS = [
    ("<think>", "</think>"),
    ("<Thinking>\n", "\n</Thinking>\n\n"),
    ("< think >", "</ think >"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought\n", "<channel|>"),
    ("Here is my thought process: ", "Here is my response: "),
    ("Here are my reasoning steps:\n", "\n[BEGIN FINAL RESPONSE]\n"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
]


@pytest.mark.parametrize(("begin", "end"), PAIRS, ids=[begin.strip() for begin, _ in PAIRS])
def test_the_answer_is_what_follows_the_thoughts(begin, end):
    assert answer_after_thoughts(f"{begin}evil{end}Take a walk.") == "Take a walk."
    assert answer_after_thoughts(f"{begin}evil") is None
    assert not answer_after_thoughts(f"{begin}evil{end}")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Take a walk.\n", "Take a walk.\n"),  # unchanged
        ("", ""),
        ("I think <b>so</b>.", "I think <b>so</b>."),
        ("evil</think>Take a walk.", "Take a walk."),  # the opening tag was in the prompt
        ("evil </think> more evil </think> Take a walk.", "Take a walk."),
        ("<think>one</think><think>two</think>Take a walk.", "Take a walk."),
        ("Take<think>evil</think> a walk.", "Take a walk."),
        ("Sure. <think>evil, on and on", None),
        ("Take a walk.</think>", "Take a walk.</think>"),
        ("Sure. Here is my response: walk.", "Sure. Here is my response: walk."),
        ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", "{}"),
        ("<|channel|>commentary<|message|>x<|end|>", None),
    ],
)
def test_other_forms(text, answer):
    assert answer_after_thoughts(text) == answer


def test_prompts_that_open_the_thoughts():
    assert opening_tag("<|im_start|>assistant\n<think>\n") == "<think>"
    assert opening_tag("<|im_start|>assistant\n<think>\n\n</think>\n\n") is None
    assert opening_tag("Write <think> tags.\n") is None


def test_control_tokens_that_are_tags():
    assert all(map(is_tag, ("<think>", "</think>", "[THINK]", "<|channel|>", "<|message|>", "<|END_THINKING|>")))
    assert not any(map(is_tag, ("<|im_end|>", "</s>", "[INST]", "<pad>")))


LONG = 100_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<|channel|>final" * LONG, None),
        ("<|channel|>final x" * LONG + "<|message|>85", "85"),
        ("<|channel|>final<|message|>a<|end|>" * LONG + "<|channel|>final<|message|>b<|return|>", "b"),
        ("</think>a" * LONG, "a"),
        ("<think>" + " " * LONG + "</think>" * LONG + "a", "a"),
        ("<" + " " * LONG + "think" * LONG, "<" + " " * LONG + "think" * LONG),
        ("[THINK]" * LONG, None),
    ],
    ids=range(7),
)
def test_long_texts_take_no_time_to_speak_of(text, said):
    """Takes seconds at most; scanning the rest of the text at every tag would take an hour."""
    assert answer_after_thoughts(text) == said
