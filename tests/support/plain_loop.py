"""Trains a defended model in a plain loop on windows of micro-batches, and helpers to disturb it."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from tiny_models import adapter_weights, tiny_peft_model
from train_runs import sgd

from safelora_fast.training import defend


def train_windows(windows, defenses, *, model=None, optimizer=None, **settings):
    """Make one optimizer step per window of micro-batches; return the adapter's weights and the metrics."""
    model = tiny_peft_model() if model is None else model
    optimizer = sgd(model) if optimizer is None else optimizer
    with defend(model, defenses, optimizer=optimizer, **settings) as defended:
        for window in windows:
            totals = defended.totals(window)
            for batch in window:
                defended.loss(batch, totals=totals).backward()
            optimizer.step()
            optimizer.zero_grad()
        metrics = defended.metrics()
        assert defended.step == (len(windows) if defended.defenses else 0)
    return adapter_weights(model), metrics


def make_step(optimizer, loss):
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def enable_checkpointing(model, *, reentrant):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    enable = getattr(base, f"{name}_checkpointing_enable")
    enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": reentrant}})
    model.enable_input_require_grads()


def scale_reference(model, factor, layer=0):
    """Multiply a layer's output in passes without gradients, such as the reference pass. Return the hook's handle."""
    block = model.get_base_model().model.layers[layer]
    return block.register_forward_hook(lambda _m, _a, out: out if torch.is_grad_enabled() else out * factor)


@contextmanager
def group_of_one(folder):
    """Create a process group that contains only this process."""
    store = torch.distributed.FileStore(str(folder / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
