"""One training step of a vision model, in this process, or on two processes that share the rows."""

from __future__ import annotations

import os

import torch
from multimodal_models import make
from peft import LoraConfig, get_peft_model
from tiny_models import adapter_weights, fill_adapter

from safelora_fast.defenses import KL, FeatureDistance
from safelora_fast.models.anatomy import dissect
from safelora_fast.training import defend


def run_multimodal(spec):
    """Return weights and metrics of one SGD step. Each process has one of the two rows; `wrapper` is "ddp" or "fsdp"."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    model, batch = make(spec["model"])
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).train()
    fill_adapter(model, seed=1)
    wrapped = model
    if world > 1:
        torch.distributed.init_process_group("gloo")
        batch = {name: value[rank::world] for name, value in batch.items()}
        wrapped = sharded(model) if spec["wrapper"] == "fsdp" else torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    with defend(wrapped, [KL(30.0), FeatureDistance(30.0, layers=2)], optimizer=optimizer) as defended:
        defended.loss(batch).backward()
        optimizer.step()
        metrics = defended.metrics()
    weights = adapter_weights(model)
    return {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in weights.items()}, metrics


def sharded(model):
    """Shard every layer of decoder and tower separately, then the outer model, then the rest."""
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model()
    for block in (*dissect(model).layers, *base.model.vision_tower.modules()):
        if isinstance(block, torch.nn.Module) and type(block).__name__.endswith(("DecoderLayer", "EncoderLayer")):
            fully_shard(block)
    fully_shard(base.model)
    return fully_shard(model)
