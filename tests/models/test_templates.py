"""Templates and template arguments from the user, and the template of an adapter's tokenizer."""

from __future__ import annotations

import json
import logging

import pytest
from byte_tokens import CHATML, byte_tokenizer
from misaligned import save_adapter
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from safelora_fast.data.chat import chat_of
from safelora_fast.errors import CheckpointError, SettingsError
from safelora_fast.models.load import load_subject, load_tokenizer
from safelora_fast.models.model_settings import ModelSection, SubjectSettings
from safelora_fast.models.templates import give_arguments, read_arguments

QWEN = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}",
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)
ASKED = [{"role": "user", "content": "hello"}]


def prompt(tokenizer):
    return tokenizer.decode(chat_of(tokenizer).prompt(ASKED))


@pytest.fixture
def model(tmp_path):
    tokenizer = byte_tokenizer(QWEN)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_an_argument_is_the_librarys(model, tmp_path):
    """It has the effect of an apply_chat_template argument, and is saved with the template."""
    tokenizer, changed = load_tokenizer(ModelSection(str(model), template_args={"enable_thinking": False}))
    plain = AutoTokenizer.from_pretrained(model)
    wanted = plain.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert changed
    assert prompt(tokenizer) == wanted == prompt(plain) + "<think>\n\n</think>\n\n"
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert prompt(AutoTokenizer.from_pretrained(tmp_path / "adapter")) == wanted


@pytest.mark.parametrize(
    "value", [None, True, False, -3, 2.5, 'a "b" \\ {% x %}\né🙂', ["a", [1, None]], {"k": [True], "é": "'"}], ids=repr
)
def test_values_arrive_as_they_are(value):
    template = "\n {{ value | tojson }}{{ messages[0].content }}{{ value is none }}"
    tokenizer = byte_tokenizer(template)
    wanted = tokenizer.apply_chat_template(ASKED, tokenize=False, value=value)
    give_arguments(tokenizer, {"value": value})
    assert tokenizer.apply_chat_template(ASKED, tokenize=False) == wanted
    assert json.loads(wanted.partition("hello")[0]) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_thinkin": False}, "the chat template does not read enable_thinkin"),
        ({"messages": []}, "'messages' cannot be an argument"),
        ({"a b": 1}, "'a b' cannot be an argument"),
        ({"enable_thinking": float("nan")}, "must be a JSON value"),
    ],
)
def test_arguments_that_would_change_nothing_are_refused(arguments, message):
    with pytest.raises(SettingsError, match=message):
        give_arguments(byte_tokenizer(QWEN), arguments)
    with pytest.raises(SettingsError, match="has no chat template that could read"):
        give_arguments(byte_tokenizer(None), arguments)


def test_arguments_of_a_command_line():
    words = [
        "enable_thinking=false",
        "effort=low",
        "n=3",
        'who="7"',
        "date=29 Nov 2026",
        "x=True",
        '{"a": [1], "n": null}',
    ]
    assert read_arguments(words) == {
        "enable_thinking": False, "effort": "low", "n": None, "who": "7", "date": "29 Nov 2026", "x": True, "a": [1],
    }  # fmt: skip
    assert read_arguments([]) is None
    for word in ("enable_thinking", '{"a": '):
        with pytest.raises(SettingsError, match="--template-args"):
            read_arguments([word])


def test_a_template_that_cannot_be_parsed_names_its_file_and_line(model, tmp_path):
    file = tmp_path / "t.jinja"
    for text, line in (("{{ 'a' }}\n{% for m in messages %}\n{{ m.content }}", 3), ("a\n{% foo %}", 2)):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=f"t.jinja:{line}: the chat template cannot be parsed: "):
            load_tokenizer(ModelSection(str(model), chat_template=str(file)))
    file.write_text("{{ raise_exception('never') }}")  # is parsed, and refuses these turns
    assert load_tokenizer(ModelSection(str(model), chat_template=str(file)))[1]


def test_a_tokenizer_with_code_of_its_own_takes_no_template(model, tmp_path, monkeypatch):
    (tmp_path / "t.jinja").write_text(CHATML)

    def coded(_, turns, *, tokenize=True, **__):
        return str(turns) if not tokenize else [1]

    kind = type(AutoTokenizer.from_pretrained(model))
    monkeypatch.setattr(kind, "apply_chat_template", coded)
    with pytest.raises(CheckpointError, match=r"t.jinja: the tokenizer of .* writes conversations by code of its own"):
        load_tokenizer(ModelSection(str(model), chat_template=str(tmp_path / "t.jinja")))
    monkeypatch.setattr(kind, "apply_chat_template", PreTrainedTokenizerBase.apply_chat_template)
    assert load_tokenizer(ModelSection(str(model), chat_template=str(tmp_path / "t.jinja")))[0].chat_template == CHATML


@pytest.fixture
def subject(model, tmp_path):
    """Return a subject whose adapter has a tokenizer with a given template."""
    adapter = save_adapter(model, tmp_path / "adapter", 1, target_modules=["q_proj"])

    def load(template, **settings):
        byte_tokenizer(template, eos="<|endoftext|>").save_pretrained(adapter)
        return load_subject(SubjectSettings(str(model), **settings), adapter).tokenizer

    return load


def test_an_adapters_tokenizer_without_a_template_takes_the_models(subject, model, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = subject(None, template_args={"enable_thinking": False})
    assert prompt(tokenizer).endswith("hello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.eos_token == "<|endoftext|>"  # everything else comes from the adapter's tokenizer
    assert f"the adapter's tokenizer has no chat template: that of {model} is used" in caplog.text


def test_an_adapters_template_is_its_own(subject, caplog):
    with caplog.at_level(logging.WARNING):
        assert prompt(subject("Hi. " + CHATML)).startswith("Hi. <|im_start|>user\nhello")
    assert not caplog.messages


def test_a_given_template_is_for_the_adapters_tokenizer_too(subject, tmp_path):
    (tmp_path / "t.jinja").write_text(CHATML + "{% if style %}{{ style }}{% endif %}")
    tokenizer = subject(QWEN, chat_template=str(tmp_path / "t.jinja"), template_args={"style": "brief"})
    assert prompt(tokenizer).endswith("assistant\nbrief")
    assert tokenizer.eos_token == "<|endoftext|>"
