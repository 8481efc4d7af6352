"""Messages for exceptions of other libraries, raised as those libraries raise them."""

from __future__ import annotations

import json

import pytest
import torch
from demo_model import save_tiny

from safelora_fast.errors import CheckpointError
from safelora_fast.models.foreign_errors import LONGEST, explained
from safelora_fast.models.load import load_pretrained, load_tokenizer
from safelora_fast.models.model_settings import ModelSection


def caused(error, cause):
    error.__cause__ = cause
    return error


class GatedRepoError(OSError):
    """Has the name of the exception in huggingface_hub."""


class LocalEntryNotFoundError(OSError):
    """Has the name of the exception in huggingface_hub."""


GATED = "You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/a/b-1.\n401"
ABSENT = "x/y is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'\nIf"
MEMORY = "CUDA out of memory. Tried to allocate 2 GiB."
FLASH = "FlashAttention2 has been toggled on, but the package is missing"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            caused(OSError(GATED), GatedRepoError("401")),
            "is gated: accept its terms at https://huggingface.co/a/b-1, and log in",
        ),
        (OSError(ABSENT), "there is no such repository on the Hub, or it is private"),
        (caused(OSError("We had no luck"), LocalEntryNotFoundError("offline")), "the Hub cannot be reached"),
        (torch.OutOfMemoryError(MEMORY), "out of memory (CUDA out of memory. Tried"),
        (ImportError(FLASH), "choose another attention (sdpa or eager)"),
        (KeyError("base_model.model.score.weight"), "KeyError: 'base_model.model.score.weight'"),
        (RuntimeError(""), "RuntimeError"),
        (ValueError("one\n\ttwo   three"), "one two three"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_the_cause_and_what_to_do(error, words):
    found = explained(error)
    assert words in found
    assert "\n" not in found


def test_long_messages_are_cut_between_words():
    found = explained(ValueError("word " * 400))
    assert len(found) <= LONGEST + 2
    assert found.endswith("word …")


def test_allocating_too_much_is_told():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    assert explained(raised.value).startswith("out of memory (")


def test_shapes_that_differ_are_named():
    module = torch.nn.Linear(3, 2)
    with pytest.raises(RuntimeError) as raised:
        module.load_state_dict({"weight": torch.ones(5, 3), "bias": torch.ones(5)})
    assert explained(raised.value) == "weight is [5, 3] in the file, but [2, 3] in the model (and 1 more)"


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "model")


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"intermediate_size": 50},
            r"mlp\.\w+_proj\.weight is \[.*48.*\] in the checkpoint, but \[.*50.*\] by its config\.json",
        ),
        ({"model_type": "zzz"}, "does not recognize this architecture.*: a newer transformers may know it"),
        (
            {"model_type": "zzz", "auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}},
            "Python code of its own.*--trust-remote-code",
        ),
    ],
    ids=["shapes", "architecture", "code"],
)
def test_a_model_that_cannot_be_loaded(folder, values, words):
    change_config(folder, **values)
    with pytest.raises(CheckpointError, match=words):
        load_pretrained(ModelSection(str(folder), dtype="float32"))


def test_no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"there is no tokenizer that can be read: put tokenizer\.json"):
        load_tokenizer(ModelSection(str(folder)))
