"""A run killed while saving: resuming from its last complete checkpoint gives the weights of an uninterrupted run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import adapter_weights, furthest, random_subspace, tiny_peft_model
from train_runs import run_transformers

from safelora_fast.defenses import KL, SafeLora, Steering, SubspacePenalty

SPEC = {
    "batch": 2,
    "accumulation": 2,
    "steps": 4,
    "arguments": {"save_strategy": "steps", "save_steps": 1, "logging_steps": 9},
}


def train(folder, *, killed_at=None, **settings):
    """Train, and return the weights. With `killed_at`, the process is killed while it writes that checkpoint."""
    model = tiny_peft_model(dropout=0.2)
    save = model.save_pretrained

    def save_and_die(target, *args, **kwargs):
        save(target, *args, **kwargs)
        if Path(target).name == f"checkpoint-{killed_at}":
            os.kill(os.getpid(), signal.SIGKILL)

    model.save_pretrained = save_and_die
    projection = SafeLora(random_subspace(model), at="step", every=2)
    penalty = SubspacePenalty(random_subspace(model, seed=1), 0.1)
    defenses = [KL(10.0), penalty, projection, Steering([0.5] * 32, 1, 2.0)]
    return adapter_weights(run_transformers({**SPEC, **settings}, folder, model=model, defenses=defenses)[0])


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-4000:]
    states = sorted(path.parent.name for path in (tmp_path / "run").glob("checkpoint-*/trainer_state.json"))
    assert states == ["checkpoint-1", "checkpoint-2"]
    assert (tmp_path / "run" / "checkpoint-3").exists()
    resumed = train(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"))
    assert furthest(resumed, train(tmp_path / "unbroken")) == 0


if __name__ == "__main__":
    train(Path(sys.argv[1]), killed_at=3)
