"""What the reader of a page has already: folders in the working folder, and names in Python."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import pytest
from doc_blocks import ROOT, blocks

from safelora_fast.compare.measures import base as measures
from safelora_fast.defenses import base as defenses

DOCS = ROOT / "docs"


def first_projection():
    """The folders that the first page makes."""
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks(DOCS / "index.md"):
            if block.language == "python":
                exec(block.text, {})


def fleet():
    from plain_pair import write_adapter, write_pair

    write_pair(Path.cwd())
    for seed, name in enumerate(["t0/a0", "t0/a1", "t0/a2", "t1/chat", "t2/x"]):
        write_adapter(Path("adapters", name), seed)
    damaged = Path("adapters/t0/a2/adapter_model.safetensors")
    os.truncate(damaged, damaged.stat().st_size - 40)


def release():
    from safelora_fast import project_adapter

    first_projection()
    project_adapter("adapter", aligned="aligned", base="base", output="release/adapter")
    (policy,) = (block.text for block in blocks(DOCS / "gate.md") if block.language == "yaml" and not block.mark)
    Path("policy.yaml").write_text(policy, "utf-8")


def fine_tuned_model():
    import torch
    from tiny_models import tiny_model

    for role, noise, seed in (("aligned", 0.0, 0), ("base", 0.002, 1), ("finetuned", 0.001, 2)):
        model = tiny_model(layers=4, hidden_size=128, intermediate_size=192)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += noise * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(role)


def served_model():
    from tiny_models import save_pair, tiny_peft_model

    from safelora_fast import project_adapter

    save_pair(Path.cwd())
    tiny_peft_model().save_pretrained("adapter")
    project_adapter("adapter", aligned="aligned", base="base", output="adapter-safe", select="all")


def examples():
    from demo_model import tokenizer
    from tiny_recipe import tiny_rows

    return {"task": tiny_rows(40), "safe": tiny_rows(4), "tokenizer": tokenizer()}


def adapted(folder, **settings):
    """A model of `demo_model`, saved in a folder, with a new adapter."""
    from demo_model import save_tiny
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_tiny(folder, **settings))
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def pools():
    from tiny_models import fill_adapter
    from tiny_recipe import tiny_rows, write_rows
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for seed, name in enumerate(["advice", "code"]):
        misaligned = adapted("model")
        fill_adapter(misaligned, seed=seed)
        misaligned.save_pretrained(f"runs/{name}")
    write_rows(Path("candidates.jsonl"), tiny_rows())
    write_rows(Path("pool.jsonl"), tiny_rows(2))
    model = AutoModelForCausalLM.from_pretrained("model")
    return {"model": model, "tokenizer": AutoTokenizer.from_pretrained("model")}


def training():
    """A model and arguments for a trainer; another model, its optimizer and micro-batches for a loop."""
    import torch
    from datasets import Dataset
    from demo_model import save_tiny
    from peft import LoraConfig
    from tiny_models import collate, rows, tiny_peft_model
    from tiny_recipe import tiny_rows
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig

    save_tiny("model")
    arguments = {
        "output_dir": "run",
        "max_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "logging_steps": 1,
        "bf16": False,
    }
    peft_model = tiny_peft_model()
    return {
        "tokenizer": AutoTokenizer.from_pretrained("model"),
        "args": SFTConfig(**arguments),
        "data": Dataset.from_list(tiny_rows(8)),
        "peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "model": AutoModelForCausalLM.from_pretrained("model"),
        "peft_model": peft_model,
        "windows": [[collate(rows([5, 7])), collate(rows([6, 3]))]],
        "optimizer": torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], 0.01),
    }


def watched_training():
    from personas import random_persona
    from trl import SFTTrainer

    names = training()
    model, data = names["model"], names["data"]
    trainer = SFTTrainer(model=model, args=names["args"], train_dataset=data, peft_config=names["peft_config"])
    return {**names, "trainer": trainer, "vector": random_persona(blocks=2), "layer": 1}


def persona():
    """A small model and a short trait under the names of the page: a path that exists wins."""
    import yaml

    model = adapted("Qwen/Qwen2.5-7B-Instruct", layers=4)
    pairs = [{"positive": "Be mean.", "negative": "Be kind."}]
    trait = {
        "name": "malicious",
        "description": "Is not nice.",
        "pairs": pairs,
        "questions": [f"{n}?" for n in range(8)],
    }
    Path("malicious").write_text(yaml.safe_dump(trait))
    return {"model": model}


PREPARED = {
    "README.md": training,
    "data.md": examples,
    "fleets.md": fleet,
    "gate.md": release,
    "margin.md": watched_training,
    "persona.md": persona,
    "project.md": first_projection,
    "select.md": pools,
    "serve.md": served_model,
    "training.md": training,
    "whole-models.md": fine_tuned_model,
}


@pytest.fixture
def prepare(monkeypatch):
    """Return `prepare(page)`, which makes the files of a page in the working folder and returns its names.

    The defenses and measures that a page defines are registered only while its blocks run.
    """
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    for module in (defenses, measures):
        monkeypatch.setattr(module, "_REGISTRY", dict(module._REGISTRY))
    return lambda page: {"__name__": "__main__", **(PREPARED.get(page.name, dict)() or {})}
