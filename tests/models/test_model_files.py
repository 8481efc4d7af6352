"""JSON files of a model that would end the process in other libraries are refused before those read them."""

from __future__ import annotations

import json

import pytest
from demo_model import save_tiny

from safelora_fast.errors import CheckpointError
from safelora_fast.models.load import load_config, load_pretrained, load_tokenizer
from safelora_fast.models.model_settings import ModelSection


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "config.json",
            {"num_hidden_layers": 10**9},
            r"num_hidden_layers is 1e\+09, which no model has; it must be from 0 to 10,000",
        ),
        ("config.json", {"vocab_size": -1}, "vocab_size is -1, which no model has"),
        (
            "config.json",
            {"vocab_size": 10**8, "hidden_size": 10**6},
            "vocab_size 100,000,000 by hidden_size 1,000,000 are embeddings",
        ),
        ("config.json", {"text_config": {"hidden_size": 10**30}}, r"hidden_size is 1e\+30, which no model has"),
        ("config.json", {"eos_token_id": "</s>"}, "eos_token_id must be a token or a list of tokens, not '</s>'"),
        ("generation_config.json", {"temperature": "1"}, "temperature must be a finite number, not '1'"),
        ("tokenizer_config.json", None, "is nested too deeply, in more than 100 levels"),
    ],
)
def test_what_is_refused(tmp_path, name, changes, words):
    file = save_tiny(tmp_path / "model") / name
    text = "[" * 100_000 if changes is None else json.dumps({**json.loads(file.read_text()), **changes})
    file.write_text(text)
    section = ModelSection(str(tmp_path / "model"), "float32", "cpu")
    for load in (load_config, load_tokenizer, load_pretrained):
        with pytest.raises(CheckpointError, match=rf"{name}: {words}$|{name}: {words}") as refused:
            load(section)
        assert "\n" not in str(refused.value)


def test_padding_that_the_first_llamas_name_is_taken(tmp_path):
    folder = save_tiny(tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "pad_token_id": -1}))
    assert load_pretrained(ModelSection(str(folder), "float32", "cpu")).config.pad_token_id == -1


def test_what_is_loaded(tmp_path):
    section = ModelSection(str(save_tiny(tmp_path / "model")), "float32", "cpu")
    assert load_pretrained(section).config.hidden_size == load_config(section).hidden_size == 32
