"""The stamp of a model changes with everything that affects the model's outputs, and with nothing else."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from demo_model import save_tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from safelora_fast.recipe import model_stamp
from safelora_fast.recipe.model_stamp import model_commit, recipe_stamp, subject_stamp


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("stamps") / "model")


@pytest.fixture
def adapter(model, tmp_path):
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def save_adapter(model, folder, **settings):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)


def rewrite(old, new):
    def edit(file):
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return edit


def flip(file):
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    status = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # keep size and time


ADAPTER_CHANGES = {
    "another lora_alpha": ("adapter_config.json", rewrite('"lora_alpha": 8', '"lora_alpha": 800')),
    "rsLoRA": ("adapter_config.json", rewrite('"use_rslora": false', '"use_rslora": true')),
    "weights": ("adapter_model.safetensors", flip),
    "a tokenizer": ("tokenizer_config.json", lambda file: file.write_text("{}")),
    "a template": ("chat_template.jinja", lambda file: file.write_text("{{ messages }}")),
    "a named template": ("additional_chat_templates/tool.jinja", lambda file: file.write_text("{{ messages }}")),
}


@pytest.mark.parametrize("name", ADAPTER_CHANGES)
def test_what_an_adapter_is_made_of_is_noticed(model, adapter, name):
    before = subject_stamp(str(model), adapter)
    file, change = ADAPTER_CHANGES[name]
    (adapter / file).parent.mkdir(exist_ok=True)
    change(adapter / file)
    after = subject_stamp(str(model), adapter)
    assert {key for key in before if before[key] != after[key]} == {"adapter_sha256"}


def test_where_an_adapter_lies_and_what_is_said_of_it_does_not_count(model, adapter, tmp_path):
    before = subject_stamp(str(model), adapter)
    adapter.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "README.md").write_text("another card")
    assert subject_stamp(str(model), tmp_path / "elsewhere") == before


def test_a_pickled_adapter_is_known_by_its_bytes(model, adapter):
    file = adapter / "adapter_model.bin"
    (adapter / "adapter_model.safetensors").rename(file)
    before = subject_stamp(str(model), adapter)["adapter_sha256"]
    flip(file)
    assert subject_stamp(str(model), adapter)["adapter_sha256"] not in {None, before}


def test_the_text_of_a_template_counts_and_not_its_name(model, tmp_path):
    (tmp_path / "one.jinja").write_text("{{ messages }}")
    (tmp_path / "two.jinja").write_text("{{ messages }}")
    one, two = (subject_stamp(str(model), None, str(tmp_path / f"{name}.jinja")) for name in ("one", "two"))
    assert one == two
    (tmp_path / "two.jinja").write_text("{{ messages }} ")
    assert subject_stamp(str(model), None, str(tmp_path / "two.jinja")) != one


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    cache = tmp_path / "models--org--name"
    for commit in ("a" * 40, "b" * 40):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text("{}")
    (cache / "refs").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    for commit in ("a" * 40, "b" * 40):
        model_stamp._commit.cache_clear()
        (cache / "refs" / "main").write_text(commit)
        assert subject_stamp("org/name")["model_commit"] == commit
    assert model_commit("org/another") is None


def test_what_a_training_reads_is_noticed(model, tmp_path):
    """The stamp covers the files and checkpoints of defenses and monitors, the margin's pairs, template and model."""
    pair = {name: tmp_path / name for name in ("aligned", "base")}
    for folder in pair.values():
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
    for name in ("vector.safetensors", "pairs.jsonl", "t.jinja"):
        (tmp_path / name).write_text(name)
    safelora = {"subspace": {name: str(folder) for name, folder in pair.items()}, "select": "all"}
    recipe = SimpleNamespace(
        model=SimpleNamespace(path=str(model), chat_template=str(tmp_path / "t.jinja")),
        margin=SimpleNamespace(pairs=str(tmp_path / "pairs.jsonl")),
        defenses=(SimpleNamespace(name="safelora", settings=safelora),),
        monitors=(SimpleNamespace(name="evil", settings={"vector": str(tmp_path / "vector.safetensors"), "layer": 1}),),
    )
    before = recipe_stamp(recipe)
    keys = {"model", "margin.pairs", "monitors.evil.vector", *(f"defenses.safelora.subspace.{name}" for name in pair)}
    assert before.keys() == keys
    for name in ("vector.safetensors", "pairs.jsonl", "t.jinja", "base/model.safetensors", "aligned/model.safetensors"):
        (tmp_path / name).write_text("WEIGHTS")
        after = recipe_stamp(recipe)
        assert sum(after[key] != before[key] for key in keys) == 1, name
        before = after
