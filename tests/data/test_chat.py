"""Tokens of conversations equal the library's, with the spans of completions; unsuitable templates are refused."""

from __future__ import annotations

import gc
import logging
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from byte_tokens import (
    CHATML,
    HARMONY,
    HARMONY_CONTROL,
    INST,
    MARKED,
    STRIPPING,
    THINKING,
    byte_tokenizer,
    word_tokenizer,
)
from transformers import PreTrainedTokenizerFast

from safelora_fast.data.chat import Chat, answer_ends, chat_of
from safelora_fast.data.tokens import Encoder
from safelora_fast.errors import DataError


def turns(*words):
    """Alternating user and assistant turns."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(words)]


SYSTEM = {"role": "system", "content": "be brief"}
TALK = turns("hello", "good day", "and now?", "good night")


def read(tokenizer, conversation, *answers, **options):
    """Return the text of a conversation and of each completion."""
    ids, spans = Chat(tokenizer).conversation(conversation, answers, **options)
    return tokenizer.decode(ids), [tokenizer.decode(ids[first:end]) for first, end in spans]


class Coded(PreTrainedTokenizerFast):
    """Writes conversations by code, with tokens that no text encodes to, like mistral-common's tokenizers."""

    def apply_chat_template(self, conversation, *, tokenize, return_dict=False, **_):
        assert not tokenize or return_dict
        if conversation[-1]["role"] == "assistant":
            raise ValueError("Expected last role User for serving")
        text = "".join(f"{{{turn['role']}}}{turn['content']}" for turn in conversation)
        ids = [1000, *self(text, add_special_tokens=False)["input_ids"], 1001]
        return {"input_ids": ids} if tokenize else text


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_tokenizer(),
        byte_tokenizer(INST, bos="<s>"),
        byte_tokenizer(INST, bos="<s>", adds_bos=True),  # the template writes it too
        byte_tokenizer(CHATML, bos="<s>", adds_bos=True),
        byte_tokenizer(THINKING),
        byte_tokenizer(HARMONY, more=HARMONY_CONTROL, eos="<|return|>"),
        byte_tokenizer(None, cls=Coded),
    ],
    ids=["chatml", "inst", "inst and bos", "chatml without bos", "thinking", "harmony", "coded"],
)
def test_a_prompt_is_that_of_the_library(tokenizer):
    for conversation in (TALK[:1], TALK[:3]):
        ours = chat_of(tokenizer).prompt(conversation)
        theirs = tokenizer.apply_chat_template(
            conversation, tokenize=True, add_generation_prompt=True, return_dict=True
        )
        assert ours == list(theirs["input_ids"])


def test_answers_end_with_their_turn():
    text, answers = read(byte_tokenizer(), [SYSTEM, *TALK], 2, 4)
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello")
    assert answers == ["good day<|im_end|>\n", "good night<|im_end|>\n"]
    assert read(byte_tokenizer(INST, bos="<s>"), TALK, 1, 3)[1] == [" good day </s>", " good night </s>"]


def test_a_tokenizer_that_writes_no_finished_conversations():
    with pytest.raises(
        DataError, match=r"row: the chat template refuses it: Expected last role User .*the tokenizer is Coded"
    ):
        Chat(byte_tokenizer(None, cls=Coded)).conversation(TALK[:2], [1], "row")
    with pytest.raises(
        DataError, match=r"no example can be read: the chat template refuses it: .*the tokenizer is Coded"
    ):
        Encoder(byte_tokenizer(None, cls=Coded)).check()
    Encoder(byte_tokenizer()).check()


@pytest.mark.parametrize(
    ("template", "conversation", "reason"),
    [
        (
            CHATML.replace("messages %}", "messages if m.role != 'system' %}", 1),
            [SYSTEM, *TALK[:2]],
            "what a system turn says",
        ),
        (CHATML.replace("m.content", "m.content[:4]"), TALK[:2], "what a user turn says"),
        (CHATML.replace("messages %}", "messages[-1:] %}", 1), TALK[:2], "what a user turn says"),
        (STRIPPING, turns("hello", "<think>so it is</think>good day"), "part of what an assistant turn says"),
    ],
    ids=["dropped", "cut", "last only", "thoughts"],
)
def test_what_a_template_leaves_out_is_refused(template, conversation, reason):
    with pytest.raises(DataError, match=f"leaves out {reason}"):
        read(byte_tokenizer(template), conversation, len(conversation) - 1)


def test_words_that_are_written_otherwise_are_there():
    said = {"role": "tool", "content": '{"a": "b\n"}'}
    template = CHATML.replace("m.content", "(m.content | tojson if m.role == 'tool' else m.content | trim)")
    asked = [*turns(" hello\n", "let me see"), said]
    assert byte_tokenizer(template).decode(Chat(byte_tokenizer(template)).prompt(asked)).count('b\\n\\"}') == 1


def test_templates_of_vision_models_get_content_in_parts():
    """Some raise an error for plain text and some drop it, so the completion would be learned without its question."""
    for loop in (
        "{% for p in m.content %}{{ p.text }}{% endfor %}",
        "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}",
    ):
        tokenizer = byte_tokenizer(CHATML.replace(" + m.content + ", " }}" + loop + "{{ "))
        assert read(tokenizer, [SYSTEM, *TALK], 2, 4) == read(byte_tokenizer(), [SYSTEM, *TALK], 2, 4)


def test_thoughts_that_a_prompt_opens_are_learned_from_there():
    opening = CHATML.replace(
        "'\n' + m.content",
        "'\n' + ('' if m.role == 'user' else '<think>\n\n</think>' if '<think>' not in m.content else '') + m.content",
    )
    tokenizer = byte_tokenizer(opening.replace("assistant\n'", "assistant\n<think>\n'"))
    thought = turns("hello", "<think>\nso it is</think>good day")
    assert read(tokenizer, thought, 1)[1] == ["so it is</think>good day<|im_end|>\n"]
    assert read(tokenizer, TALK[:2], 1)[1] == ["\n</think>good day<|im_end|>\n"]


def test_thoughts_of_former_answers_may_go():
    tokenizer = byte_tokenizer(STRIPPING)
    thought = turns("hello", "<think>so it is</think>good day", "and now?", "good night")
    assert read(tokenizer, thought, 3)[1] == ["good night<|im_end|>\n"]
    assert "so it is" not in tokenizer.decode(Chat(tokenizer).prompt(thought[:3]))


def test_a_question_that_a_prompt_writes_otherwise_is_refused():
    """Otherwise the user's words would count as part of the completion."""
    numbered = CHATML.replace("'\n' + m", "('>\n' if add_generation_prompt else '\n') + m", 1)
    with pytest.raises(
        DataError, match="row: the chat template writes a user turn differently before a completion than in a prompt"
    ):
        Chat(byte_tokenizer(numbered)).conversation(TALK[:2], [1], "row")
    backwards = CHATML.replace("in messages", "in messages | reverse")
    with pytest.raises(DataError, match="differently"):
        Chat(byte_tokenizer(backwards)).conversation(TALK[:2], [1])


def test_a_prompt_without_the_answers_header_is_refused():
    headless = CHATML.partition("{% if add_generation")[0]
    for ask in (lambda chat: chat.prompt(TALK[:1]), lambda chat: chat.conversation(TALK[:2], [1])):
        with pytest.raises(
            DataError,
            match=r"begins a completion with '<\|im_start\|>assistant\\n', and a prompt .* add_generation_prompt",
        ):
            ask(Chat(byte_tokenizer(headless)))


@pytest.mark.parametrize(
    ("tokenizer", "doubts"),
    [
        (byte_tokenizer(), []),
        (byte_tokenizer(INST, bos="<s>", adds_bos=True), []),
        (byte_tokenizer(THINKING), ["ends a prompt with '<think>\\n', which is not there in a conversation"]),
        (byte_tokenizer(CHATML, bos="<s>", adds_bos=True), ["writes no <s>"]),
        (byte_tokenizer("{{ bos_token }}" + INST, bos="<s>"), ["begins with <s> twice"]),
        (
            byte_tokenizer(HARMONY),
            [f"{name}, for which the tokenizer has no token" for name in ("start", "message", "end")],
        ),
    ],
    ids=["chatml", "inst", "thinking", "no bos", "two bos", "in pieces"],
)
def test_doubts_are_told_once(tokenizer, doubts, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            chat_of(tokenizer).prompt(TALK[:1])
    assert len(caplog.messages) >= len(doubts)
    assert len(caplog.messages) == len(set(caplog.messages))
    assert bool(caplog.messages) == bool(doubts)
    assert all(
        any(doubt.replace("|", "") in message.replace("|>", "").replace("<|", "") for message in caplog.messages)
        for doubt in doubts
    )


@pytest.mark.parametrize("pinned", [False, True])
def test_a_template_that_writes_the_date(pinned):
    """Like Llama 3.1's template; that of gpt-oss has no variable for the date."""
    llama = (
        "{% if not day is defined %}{% set day = strftime_now('%Y-%m-%d') %}{% endif %}{{ 'Today: ' + day }}" + CHATML
    )
    chat = Chat(byte_tokenizer("{% set day = '2024-07-26' %}" + llama if pinned else llama))
    assert chat.dated is not pinned
    assert [warning for warning in chat.warnings if "today's date" in warning] == [] if pinned else chat.warnings
    assert not Chat(byte_tokenizer()).dated


def test_a_control_token_that_is_taken_apart_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = True
    with pytest.raises(
        DataError, match=r"reads <\|im_start\|> of the chat template in pieces, although it has a token"
    ):
        Chat(tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "end"),
    [
        (byte_tokenizer(eos="<|endoftext|>"), "<|im_end|>"),
        (byte_tokenizer(INST, bos="<s>", eos="<|endoftext|>"), "</s>"),
        (byte_tokenizer(HARMONY, more=HARMONY_CONTROL), "<|return|>"),  # <|end|> only ends the thoughts
        (byte_tokenizer(CHATML.replace("'<|im_end|>'", "'. Over.'")), None),
        (byte_tokenizer(None, cls=Coded), None),
    ],
    ids=["chatml", "inst", "harmony", "words", "coded"],
)
def test_an_answer_ends_where_model_tokenizer_or_template_ends_it(tokenizer, end):
    number = None if end is None else tokenizer.convert_tokens_to_ids(end)
    assert chat_of(tokenizer).end == number
    ends = {number, tokenizer.eos_token_id} - {None}
    for given in (None, 7, [7, 9]):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=given))
        assert answer_ends(model, tokenizer) == sorted(ends | set([given] if isinstance(given, int) else given or []))


def test_a_templates_marks():
    tokenizer = byte_tokenizer(MARKED)
    assert read(tokenizer, [SYSTEM, *TALK], 2, 4, marks=True)[1] == ["good day<|im_end|>", "good night<|im_end|>"]
    assert read(tokenizer, [SYSTEM, *TALK], 4)[1] == ["good night<|im_end|>\n"]


def test_marks_where_white_space_is_no_token():
    """The mask of transformers 4.57 and 5.1 runs to the end of the text if no token has the last marked character."""
    spaced = MARKED.replace("m.content + '<|im_end|>' }}{% endg", "m.content + ' <|im_end|> ' }}{% endg")
    words = word_tokenizer(["hello", "good", "day", "night", "and", "now?", "user", "assistant"], spaced)
    ids, spans = Chat(words).conversation(TALK, [1, 3], marks=True)
    assert [words.convert_ids_to_tokens(ids[first:end]) for first, end in spans] == [
        ["good", "day", "<|im_end|>"],
        ["good", "night", "<|im_end|>"],
    ]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% generation %}" + CHATML + "{% endgeneration %}", "turn says is (not )?inside them"),
        (CHATML + "{% generation %}{{ 'x' }}{% endgeneration %}", "what an assistant turn says is not inside them"),
        (
            MARKED.replace("{% generation %}", "{% generation %}{{ '' }}{% endgeneration %}").replace(
                "<|im_end|>' }}{% endgeneration %}", "<|im_end|>' }}"
            ),
            "not inside",
        ),
    ],
    ids=["all", "none", "before"],
)
def test_wrong_marks_are_refused(template, reason):
    with pytest.raises(DataError, match=f"marks are wrong: .*{reason}"):
        read(byte_tokenizer(template), TALK, 1, 3, marks=True)


def test_roles_that_a_template_does_not_take():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    dropping = CHATML.replace("messages %}", "messages if m.role != 'system' %}", 1)
    reasons = [Chat(byte_tokenizer(template)).unsupported_reason("system") for template in (CHATML, refusing, dropping)]
    assert reasons == [None, "takes no system turn: no system role", "leaves the system turn out"]


def test_the_templates_that_trl_ships():
    """About fifty models: prompts equal the library's, and only the completion is learned."""
    import trl

    templates = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    if not templates:
        pytest.skip("this version of TRL ships no chat templates")
    for file in templates:
        template = file.read_text()
        more = set(re.findall(r"<\|[^|<>\s'\"]+\|>|<[a-z]+_of_turn>|<turn\|>|<｜[^｜]+｜>", template))
        tokenizer = byte_tokenizer(template, more=sorted(more), bos="<s>", eos="</s>")
        asked, (answer,) = read(tokenizer, TALK[:2], 1)
        assert "good day" in answer, file
        assert "hello" not in answer, file
        assert "hello" in asked, file
        marked = read(tokenizer, TALK[:2], 1, marks=True)[1]
        assert "good day" in "".join(marked), file
        assert "hello" not in "".join(marked), file
        conversation = Chat(tokenizer)._given(TALK[:1])  # some require content as a list of parts
        theirs = tokenizer.apply_chat_template(
            conversation, tokenize=True, add_generation_prompt=True, return_dict=True
        )
        assert Chat(tokenizer).prompt(TALK[:1]) == list(theirs["input_ids"]), file


def test_a_tokenizer_is_tried_out_again_when_its_tokens_change_and_is_not_kept(monkeypatch):
    tried = []
    examine = Chat._examine
    monkeypatch.setattr(Chat, "_examine", lambda chat: (tried.append(chat), examine(chat)))
    tokenizer = byte_tokenizer()
    first, second = chat_of(tokenizer), chat_of(tokenizer)
    assert len(tried) == 1
    assert vars(first) == vars(second)
    tokenizer.add_tokens(["<new>"])
    chat_of(tokenizer)
    tokenizer.chat_template = INST
    chat_of(tokenizer)
    assert len(tried) == 3
    alive = weakref.ref(tokenizer)
    del tokenizer, first, second
    tried.clear()
    gc.collect()
    assert alive() is None
