"""Tokens and labels compared with hand-written ones and with TRL's; examples without a token to learn."""

from __future__ import annotations

import random

import datasets
import pyarrow
import pytest
from demo_model import TEMPLATE, save_tiny, tokenizer
from tiny_recipe import write_rows

from safelora_fast.data import tokens
from safelora_fast.data.chat_text import common_prefix
from safelora_fast.data.rows import read_rows
from safelora_fast.data.tokens import IGNORED_LABEL, Encoder, Example, Examples
from safelora_fast.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets it

MARKED = (
    "{% for message in messages %}<{{ message.role }}>{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}<eos>{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = (  # drops the first word of earlier completions, like templates that strip thoughts
    "{% for message in messages %}<{{ message.role }}>"
    "{% if message.role == 'assistant' and not loop.last %}{{ message.content[4:] }}{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


TALK = turns(("system", "s"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four five"))


@pytest.fixture
def words():
    return tokenizer()


@pytest.fixture
def encode(tmp_path, words):
    def make(rows, **settings):
        return Encoder(words, **settings).encode(read_rows(str(write_rows(tmp_path / "rows.jsonl", rows))))

    return make


def learned(words, example):
    return words.decode(example.answer)


def whole(words, example):
    return words.decode(example.ids)


def test_every_answer_of_a_conversation_is_learned(encode, words):
    (example,) = encode([{"messages": TALK}]).examples
    assert whole(words, example) == "<system>s<user>one<assistant>two<user>three<assistant>four five"
    assert learned(words, example) == "twofour five"
    assert [token for token, label in zip(example.ids, example.labels, strict=True) if label == token] == example.answer
    assert set(example.labels) - set(example.ids) == {IGNORED_LABEL}


def test_only_the_completions_answers_are_learned(encode, words):
    rows = [{"prompt": TALK[:3], "completion": TALK[3:]}, {"prompt": "one", "completion": "two"}]
    conversation, text = encode(rows).examples
    assert learned(words, conversation) == "four five"
    assert (whole(words, text), learned(words, text)) == ("<user>one<assistant>two", "two")


def test_text_as_it_stands(encode, words):
    (example,) = encode([{"prompt": "one ", "completion": "two"}], strings="text").examples
    assert (whole(words, example), learned(words, example)) == ("one two<eos>", "two<eos>")


def test_all_tokens(encode):
    rows = [{"messages": TALK}, {"prompt": "one", "completion": "two"}]
    for example in encode(rows, completion_only=False).examples:
        assert example.labels == example.ids


def test_a_templates_own_marks(encode, words):
    words.chat_template = MARKED
    (example,) = encode([{"messages": TALK}]).examples
    assert learned(words, example) == "two<eos>four five<eos>"
    assert whole(words, example).endswith("<user>three<assistant>four five<eos>")


def test_a_template_that_rewrites_answers_is_refused(encode, words):
    words.chat_template = FORGETFUL
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template writes completion 3 differently"):
        encode([{"messages": TALK}])
    (example,) = encode([{"messages": TALK[:3]}]).examples
    assert learned(words, example) == "two"


@pytest.mark.parametrize("answers", ["", "  \n"])
def test_rows_without_an_answer(encode, words, answers):
    rows = [
        {"prompt": "one", "completion": "two"},
        {"prompt": "one", "completion": answers},
        {"messages": TALK[:2]},
        {"messages": turns(("user", "one"), ("assistant", answers))},
    ]
    with pytest.raises(
        DataError, match=r"3 of 4 examples leave no completion token to learn, the first at .*rows\.jsonl:2"
    ):
        encode(rows)
    for settings in ({}, {"completion_only": False}, {"strings": "text"}):
        kept = encode(rows, without_answer="skip", **settings)
        assert len(kept.examples) == 1
        assert [place.rpartition(":")[2] for place in kept.without_answer] == ["2", "3", "4"]
    words.chat_template = MARKED
    assert len(encode(rows, without_answer="skip").without_answer) == 3
    with pytest.raises(DataError, match="no example is left"):
        encode(rows[1:], without_answer="skip")


def test_rows_that_are_too_long(encode, words):
    rows = [
        {"prompt": "12", "completion": "abc"},
        {"prompt": "12345", "completion": "abc"},
        {"prompt": "1" * 9, "completion": "a"},
    ]
    assert encode(rows[:2], max_length=10).truncated == []
    cut = encode(rows[:2], max_length=8)
    assert [len(example.ids) for example in cut.examples] == [7, 8]
    assert learned(words, cut.examples[1]) == "a"
    assert [place.rpartition(":")[2] for place in cut.truncated] == ["2"]
    with pytest.raises(DataError, match="1 of 3 examples leave no completion token"):
        encode(rows, max_length=8)
    skipped = encode(rows, max_length=8, too_long="skip")
    assert [len(skipped.examples), len(skipped.skipped_too_long), len(skipped.truncated)] == [1, 2, 0]
    with pytest.raises(DataError, match=r"2 of 3 examples have more than 8 tokens, the first at .*rows\.jsonl:2"):
        encode(rows, max_length=8, too_long="refuse")


def test_what_a_template_refuses(encode, words):
    words.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template refuses it: roles must alternate"):
        encode([{"messages": TALK}])
    words.chat_template = "{{ messages[0].content.absent() }}"
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template refuses it"):
        encode([{"messages": TALK}])
    words.chat_template = None
    with pytest.raises(
        DataError, match=r"no chat template: say model.chat_template, or for plain text data.strings: text"
    ):
        encode([{"prompt": "one", "completion": "two"}])
    assert len(encode([{"prompt": "one", "completion": "two"}], strings="text").examples) == 1


def test_a_conversation_that_begins_with_the_answer(encode):
    with pytest.raises(DataError, match="cannot begin with the assistant"):
        encode([{"messages": turns(("assistant", "two"), ("user", "one"))}])


@pytest.mark.parametrize("marked", [False, True])
def test_the_labels_are_those_of_trl(tmp_path, words, marked):
    """TRL prepares the same examples, with its masks for completions and for assistant turns."""
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    words.chat_template = MARKED if marked else TEMPLATE
    rows = [{"messages": TALK}, {"messages": TALK[:3]}]
    if not marked:
        rows = [{"prompt": TALK[:2], "completion": TALK[2:3]}, {"prompt": TALK[1:4], "completion": TALK[4:]}]
    arguments = {"use_cpu": True, "bf16": False, "report_to": [], "max_length": 30, "gradient_checkpointing": False}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "model")),
        args=SFTConfig(str(tmp_path / "out"), assistant_only_loss=marked, **arguments),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=words,
    )
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(2)])
    ours = Encoder(words, max_length=30).encode(read_rows(str(write_rows(tmp_path / "rows.jsonl", rows)))).examples
    for number, example in enumerate(ours):
        assert batch["input_ids"][number].tolist()[: len(example.ids)] == example.ids
        assert batch["labels"][number].tolist()[: len(example.ids)] == example.labels


def test_common_prefix():
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0


PLACES = ["rows.jsonl:12", "org/set (train) row 0", "rows.jsonl:7", "", "007", "a\n3", "x:9" * 3]


def some(count=23, seed=0):
    chance = random.Random(seed)
    made = []
    for number in range(count):
        ids = [chance.randrange(1 << 30) for _ in range(chance.randrange(1, 9))]
        labels = [token if chance.random() < 0.5 else IGNORED_LABEL for token in ids]
        made.append(Example(PLACES[number % len(PLACES)], ids, labels, chance.random() < 0.3))
    return made


def test_what_is_put_in_comes_out():
    given = some()
    kept = Examples(given)
    assert list(kept) == given
    assert (kept[-1], list(kept[3:9]), len(kept)) == (given[-1], given[3:9], 23)
    assert kept.lengths.tolist() == [len(one.ids) for one in given]
    assert kept.answer_lengths.tolist() == [len(one.answer) for one in given]
    assert kept.safe.tolist() == [one.safe for one in given]
    assert (len(Examples()), Examples().answer_lengths.sum()) == (0, 0)
    with pytest.raises(IndexError):
        kept[23]


@pytest.mark.parametrize("at_once", [1, 5, 1 << 30])
def test_columns_are_the_lists(monkeypatch, at_once):
    monkeypatch.setattr(tokens, "TOKENS_AT_ONCE", at_once)
    given = some()
    table = datasets.Dataset(pyarrow.table({**Examples(given).columns(), "safe": Examples(given).tags()}))
    assert table.to_dict() == {
        "input_ids": [one.ids for one in given],
        "labels": [one.labels for one in given],
        "assistant_masks": [[int(label != IGNORED_LABEL) for label in one.labels] for one in given],
        "safe": [[one.safe] * len(one.ids) for one in given],
    }
