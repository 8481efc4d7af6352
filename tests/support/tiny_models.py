"""Small random models, adapters and batches; deterministic."""

from __future__ import annotations

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from safelora_fast.models.lora_factors import adapted_modules
from safelora_fast.subspace.module_subspace import ModuleSubspace
from safelora_fast.subspace.safe_subspace import SafeSubspace

VOCABULARY = 61
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_model(*, layers: int = 3, seed: int = 0, **settings):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "use_cache": False,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **settings}))


def tiny_peft_model(*, layers: int = 3, seed: int = 0, dropout: float = 0.0, lora=None, **settings):
    """Return a PEFT model whose lora_B is far from zero, because at B = 0 the gradients of all defenses vanish."""
    model = tiny_model(layers=layers, seed=seed, **settings)
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": dropout, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    peft_model = get_peft_model(model, LoraConfig(**{**options, **(lora or {})}))
    fill_adapter(peft_model, seed=seed + 1)
    return peft_model


def fill_adapter(model, *, seed: int, adapter: str = "default", scale: float = 0.2):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and f".{adapter}." in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)


def random_subspace(model, rank=3, seed=0):
    """Return a subspace with random orthonormal vectors for every adapted module."""
    random = np.random.default_rng(seed)
    modules = {}
    for module in adapted_modules(model.get_base_model(), owner="test"):
        rows_, columns = module.lora_b.shape[0], module.lora_a.shape[1]
        vectors = np.linalg.qr(random.standard_normal((rows_, rank)))[0].astype(np.float32)
        values = np.sort(random.random(rank).astype(np.float32))[::-1].copy()
        modules[module.name] = ModuleSubspace(vectors, values, 2.0, columns)
    return SafeSubspace(modules, {"aligned": {"path": "a"}, "base": {"path": "b", "revision": "1"}})


def save_pair(folder, **settings):
    """Save the model that `tiny_peft_model` adapts as "aligned", and another random model as "base"."""
    for role, seed in (("aligned", 0), ("base", 5)):
        tiny_model(seed=seed, **settings).save_pretrained(folder / role)
    return {role: folder / role for role in ("aligned", "base")}


def rows(lengths: list[int], *, seed: int = 3, prompt: int = 2) -> list[dict[str, list[int]]]:
    """Return tokenized examples of the given lengths, without labels on the first `prompt` tokens."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for length in lengths:
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        result.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return result


def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Collate examples with padding on the right."""
    width = max(len(example["input_ids"]) for example in examples)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([list(e[key]) + [fill] * (width - len(e[key])) for e in examples])

    ids = padded("input_ids", 0)
    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (width - len(e["input_ids"])) for e in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", -100)}


def pack(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pack examples into one row: position ids separate the documents, and there is no attention mask."""
    ids = [token for e in examples for token in e["input_ids"]]
    labels = [label for e in examples for label in [-100, *e["labels"][1:]]]
    positions = [position for e in examples for position in range(len(e["input_ids"]))]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }


def adapter_weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def furthest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)
