"""A tiny model, conversations and a file of settings for the trainers of other libraries."""

from __future__ import annotations

import json

import yaml
from demo_model import save_tiny

from safelora_fast.training import Defended

KL = {"defenses": {"kl": {"weight": 30.0}}}


def write_inputs(folder):
    """Write two models (`model`, `base`) and 16 conversations (`data.jsonl`) of different lengths."""
    save_tiny(folder / "model")
    save_tiny(folder / "base", seed=5)
    with (folder / "data.jsonl").open("w") as file:
        for number in range(16):
            turns = [("user", f"What is {number}?"), ("assistant", f"It is {'x' * (number % 7 + 1)}.")]
            messages = [{"role": role, "content": text} for role, text in turns]
            row = {"messages": messages, "channel": "safe" if number % 3 == 1 else "task"}
            file.write(json.dumps(row) + "\n")
    return folder


def write_settings(path, values):
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def pair_of(folder):
    """SafeLora at the end, for the models of :func:`write_inputs`."""
    pair = {"aligned": str(folder / "model"), "base": str(folder / "base")}
    return {"safelora": {"at": "end", "select": "all", "subspace": pair}}


def losses(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def shared_losses(monkeypatch):
    """Return a list that grows with each micro-batch whose task loss comes from KL's logits."""
    calls, former = [], Defended.shared_loss

    def shared_loss(self, *args, **kwargs):
        calls.append(1)
        return former(self, *args, **kwargs)

    monkeypatch.setattr(Defended, "shared_loss", shared_loss)
    return calls
