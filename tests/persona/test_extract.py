"""From a trait to a vector: compared with plain float64 arithmetic, interrupted, scored again, and rejected."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from demo_model import save_tiny, tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from personas import plain_means, tiny_trait
from tiny_models import fill_adapter
from transformers import AutoModelForCausalLM

from safelora_fast import PersonaVector, extract_persona_vector
from safelora_fast.errors import (
    CheckpointError,
    DataError,
    InterruptedRunError,
    OutputError,
    SettingsError,
    TrainingError,
)
from safelora_fast.models import generate
from safelora_fast.persona import activations
from safelora_fast.persona.activations import separations
from safelora_fast.persona.responses import Request

SETTINGS = {"max_new_tokens": 12, "batch_size": 5, "dtype": "float32", "device": "cpu"}
TRAIT = tiny_trait()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", layers=3)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "mean.safetensors"


def extract(model, output=None, trait=TRAIT, **changes):
    return extract_persona_vector(model, trait, output=output, **{**SETTINGS, **changes})


def stored(output):
    return [json.loads(line) for line in output.with_suffix(".responses.jsonl").read_text().splitlines()]


class Interrupting:
    """Raises KeyboardInterrupt before a batch, like Ctrl-C."""

    def __init__(self, monkeypatch, before):
        self.batches = 0
        self._before, self._generate = before, generate.generate_tokens
        monkeypatch.setattr(generate, "generate_tokens", self)

    def __call__(self, *args, **kwargs):
        if self.batches == self._before:
            raise KeyboardInterrupt
        self.batches += 1
        return self._generate(*args, **kwargs)


def test_the_vector_is_the_plain_one(model, output):
    vector = extract(model, output, samples=2)
    rows = stored(output)
    assert len(rows) == 2 * 2 * 3 * 2
    rows = [row for row in rows if row["tokens"]]
    truth, words = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval(), tokenizer()
    means = []
    for row in rows:
        turns = [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["user"]}]
        prompt = words(words.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))["input_ids"]
        assert words.decode(row["tokens"], skip_special_tokens=True) == row["answer"]
        means.append(plain_means(truth, prompt, row["tokens"]))
    means = torch.stack(means).numpy()
    positive = np.array([row["id"].startswith("positive") for row in rows])
    expected = means[positive].mean(0) - means[~positive].mean(0)
    assert vector.vectors.shape == (3, 32)
    for ours, theirs in zip(vector.vectors, expected, strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)
    halves = np.array([int(row["id"].split("/")[2]) % 2 for row in rows])
    figures = separations(means, positive, halves)
    for ours, theirs in zip(vector.separation, figures, strict=True):
        assert (ours.effect, ours.share) == (pytest.approx(theirs.effect, rel=1e-3), theirs.share)


def test_the_file_says_where_it_comes_from(model, output):
    vector = extract(model, output)
    loaded = PersonaVector.load(output)
    assert loaded.to_dict() == vector.to_dict()
    facts = loaded.provenance
    assert facts["model"]["source"] == str(model)
    assert facts["model"]["dtype"] == "float32"
    assert len(facts["model"]["weights"]) == 64
    assert facts["trait"] == {"description": TRAIT.description, "sha256": TRAIT.sha256}
    assert facts["settings"] == {"seed": 0, "samples": 1, "temperature": 1.0, "max_new_tokens": 12, "threshold": None}
    assert sum(sum(side.values()) for side in facts["counts"].values()) == 12
    assert {"safelora-fast", "torch", "transformers"} <= facts["versions"].keys()


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(model, tmp_path):
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        output = tmp_path / name / "mean.safetensors"
        extract(model, output, seed=seed)
        contents.append((output.read_bytes(), output.with_suffix(".responses.jsonl").read_bytes()))
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[2][0]
    assert {row["answer"] for row in stored(tmp_path / "a" / "mean.safetensors")} != {
        row["answer"] for row in stored(tmp_path / "c" / "mean.safetensors")
    }


def test_answers_of_another_adapter_are_not_taken(model, output, tmp_path):
    """The adapter of one loaded model is switched. The journal of one state is rejected in the other."""
    settings = LoraConfig(r=4, target_modules="all-linear")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), settings, "A")
    adapted.add_adapter("B", settings)
    for seed, name in enumerate("AB"):
        fill_adapter(adapted, seed=seed, adapter=name, scale=0.3)

    def vector(output, **changes):
        return extract_persona_vector(
            adapted, TRAIT, output=output, tokenizer=tokenizer(), max_new_tokens=12, **changes
        )

    first = vector(output)
    adapted.set_adapter("B")
    with pytest.raises(SettingsError, match=r"settings have changed: weights was .*; pass --regenerate"):
        vector(output, overwrite=True)
    with adapted.disable_adapter(), pytest.raises(SettingsError, match="settings have changed: weights"):
        vector(output, overwrite=True)
    other = vector(tmp_path / "fresh.safetensors")
    assert np.linalg.norm(first.vectors - other.vectors) > 0.1 * np.linalg.norm(other.vectors)
    adapted.set_adapter("A")
    assert np.array_equal(vector(output, overwrite=True).vectors, first.vectors)


def test_a_learned_prompt_is_refused(model):
    """A learned prompt is outside the layers, so the vector would be that of the model without it."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompted = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(SettingsError, match=r"learned prompt .*PROMPT_TUNING"):
        extract_persona_vector(prompted, TRAIT, tokenizer=tokenizer())


def test_batches_decide_nothing(model):
    one, other = (extract(model, batch_size=size) for size in (1, 12))
    assert np.abs(one.vectors - other.vectors).max() < 1e-6


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_extraction_goes_on(model, tmp_path, monkeypatch, torn):
    whole, output = tmp_path / "whole" / "mean.safetensors", tmp_path / "mean.safetensors"
    extract(model, whole)
    journal = output.with_suffix(".responses.jsonl")
    with monkeypatch.context() as patch:
        stop = Interrupting(patch, before=2)
        with pytest.raises(InterruptedRunError, match=r"10 of 12 responses are kept in .*run the same again"):
            extract(model, output)
        assert stop.batches == 2
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [journal.name]
    if torn:
        journal.write_bytes(journal.read_bytes()[:-20])
    with monkeypatch.context() as patch:
        again = Interrupting(patch, before=9)
        extract(model, output)
        assert again.batches == (2 if torn else 1)
    assert output.read_bytes() == whole.read_bytes()
    assert journal.read_bytes() == whole.with_suffix(".responses.jsonl").read_bytes()


def test_ctrl_c_before_the_first_batch_leaves_nothing(model, tmp_path, output, monkeypatch):
    Interrupting(monkeypatch, before=0)
    with pytest.raises(KeyboardInterrupt):
        extract(model, output)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_averaging_keeps_the_responses(model, output, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(activations, "response_means", interrupted)
    with pytest.raises(InterruptedRunError, match="12 of 12 responses are kept"):
        extract(model, output)
    with pytest.raises(KeyboardInterrupt):
        extract(model)
    assert not output.exists()


def test_out_of_memory_is_one_line(model, output, monkeypatch):
    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried hard.")

    monkeypatch.setattr(generate, "generate_tokens", full)
    with pytest.raises(
        TrainingError, match=r"out of memory \(CUDA out of memory.\); lower batch_size; no response is kept"
    ):
        extract(model, output)


def test_scoring_anew_generates_nothing(model, output, monkeypatch):
    plain = extract(model, output)
    Interrupting(monkeypatch, before=0)
    chosen = {"positive/0/1/0": 90, "positive/1/2/0": 51, "negative/0/0/0": 49, "negative/1/1/0": 0}
    seen = []

    def judge(response):
        seen.append(response)
        return chosen.get(response.request.id, 50)

    with pytest.raises(OutputError, match="exists already"):
        extract(model, output, judge=judge)
    vector = extract(model, output, judge=judge, overwrite=True)
    assert {response.answer for response in seen} <= {row["answer"] for row in stored(output)}
    assert vector.provenance["counts"]["positive"] == {"kept": 2, "filtered": 4}
    assert vector.provenance["settings"]["threshold"] == 50
    assert not np.allclose(vector.vectors, plain.vectors)
    again = extract(model, output, overwrite=True)
    assert np.array_equal(again.vectors, plain.vectors)


def test_more_samples_keep_what_is_there(model, output):
    extract(model, output)
    first = output.with_suffix(".responses.jsonl").read_bytes()
    extract(model, output, samples=2, overwrite=True)
    assert output.with_suffix(".responses.jsonl").read_bytes().startswith(first)
    assert len(stored(output)) == 24


def test_responses_of_another_model_are_refused_and_may_be_forgotten(model, output, tmp_path):
    extract(model, output)
    other = save_tiny(tmp_path / "other", seed=1, layers=3)
    with pytest.raises(SettingsError, match=r"responses.jsonl: settings have changed: weights was"):
        extract(other, output, overwrite=True)
    with pytest.raises(SettingsError, match=r"seed was 0, is 1"):
        extract(model, output, seed=1, overwrite=True)
    extract(other, output, overwrite=True, regenerate=True)
    assert {row["made"]["model"] for row in stored(output)} == {str(other)}


def test_a_loaded_model_is_asked_as_it_is_and_left_as_it_was(model):
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    plain = extract(model)
    assert np.array_equal(extract(loaded, tokenizer=tokenizer()).vectors, plain.vectors)
    assert loaded.training
    adapted = get_peft_model(loaded, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    assert np.array_equal(extract(adapted, tokenizer=tokenizer()).vectors, plain.vectors)
    fill_adapter(adapted, seed=1)
    assert not np.allclose(extract(adapted, tokenizer=tokenizer()).vectors, plain.vectors)
    assert not any(module._forward_hooks for module in adapted.modules())
    with pytest.raises(SettingsError, match="needs its tokenizer"):
        extract(loaded)


NO_SYSTEM = "{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
REFUSING = "{% for message in messages %}" + NO_SYSTEM + "{{ message.content }}{% endfor %}"
SILENT = (
    "{% for message in messages %}{% if message.role != 'system' %}<user>{{ message.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            REFUSING,
            r"the chat template refuses a system turn \(.*System role not supported\); a trait is asked for in system",
        ),
        (SILENT, "the chat template leaves out what a system turn says; a trait is asked for in system turns"),
        ("<user>{{ messages[0].content }}", "the chat template leaves out what a user turn says"),
    ],
)
def test_a_template_without_system_turns(model, tmp_path, output, template, message):
    (tmp_path / "template.jinja").write_text(template)
    with pytest.raises(SettingsError, match=message) as refused:
        extract(model, output, chat_template=str(tmp_path / "template.jinja"))
    assert str(refused.value).startswith(str(model))
    assert "\n" not in str(refused.value)
    assert not output.with_suffix(".responses.jsonl").exists()


def test_a_model_without_template(model):
    words = tokenizer()
    words.chat_template = None
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(SettingsError, match="the tokenizer has no chat template"):
        extract(loaded, tokenizer=words)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples is 0, it must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 0.0, "samples": 2}, "samples of temperature 0 are all the same"),
        ({"max_new_tokens": 4090}, "more than the 4096 positions of"),
    ],
)
def test_settings_out_of_range(model, settings, message):
    with pytest.raises(SettingsError, match=message):
        extract(model, **settings)


def test_what_cannot_be_read_or_written(model, tmp_path):
    with pytest.raises(SettingsError, match=r"a persona vector is a \.safetensors file"):
        extract(model, tmp_path / "vector.pt")
    with pytest.raises(CheckpointError, match="neither a file, nor a folder, nor a Hub id"):
        extract(tmp_path / "absent", tmp_path / "vector.safetensors")
    with pytest.raises(DataError, match="no negative response is left"):
        extract(model, judge=lambda _: 99)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_gives_nan(model):
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.model.layers[1].mlp.down_proj.weight.data[0] = torch.nan
    with pytest.raises(TrainingError, match="layer 1 gives NaN or Inf"):
        extract(loaded, tokenizer=tokenizer())


def test_a_trait_of_the_package_by_name(model):
    vector = extract(model, trait="sycophantic", max_new_tokens=2, batch_size=64)
    assert vector.trait == "sycophantic"
    assert vector.suggestion in vector.candidates
    assert extract(model, trait=replace(TRAIT, name="other")).trait == "other"


def test_numbers_belong_to_a_request():
    requests = [
        Request(side, pair, question, sample, "s", "u")
        for side in ("positive", "negative")
        for pair in (0, 1)
        for question in (0, 1)
        for sample in (0, 1)
    ]
    first = [request.draws(0, 4).tolist() for request in requests]
    assert len({tuple(row) for row in first}) == len(requests)
    assert [request.draws(0, 4).tolist() for request in requests] == first
    assert all(request.draws(1, 4).tolist() != row for request, row in zip(requests, first, strict=True))
    assert requests[0].draws(0, 9)[:4].tolist() == first[0]
    assert len({request.id for request in requests}) == len(requests)
