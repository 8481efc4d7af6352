"""DefendedSFTTrainer: packing, evaluation, and adapters created by the trainer itself."""

from __future__ import annotations

import pytest
from datasets import Dataset
from peft import LoraConfig
from tiny_models import TARGETS, adapter_weights, furthest, rows, tiny_model
from train_runs import completions, run, run_trl

from safelora_fast.defenses import KL, FeatureDistance

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets it

STRONG = {"kl": 30.0, "feature_distance": 30.0}
SPEC = {"batch": 2, "accumulation": 2, "steps": 3, "model": {"dropout": 0.2}}


def strong():
    return [KL(30.0), FeatureDistance(30.0, layers=2)]


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_documents_are_sequences(batch, tmp_path):
    """Any packing gives the same step as the same documents in padded rows."""
    whole, metrics = run({"kind": "loop", "batch": 8, "defenses": STRONG}, tmp_path)
    arguments = {"packing": True, "max_length": 24}
    accumulation = 2 if batch == 1 else 1
    spec = {"kind": "trl", "batch": batch, "accumulation": accumulation, "defenses": STRONG, "arguments": arguments}
    packed, packed_metrics = run(spec, tmp_path)
    assert furthest(whole, packed) < 1e-5
    for name in ("defense/kl", "defense/feature_distance"):
        assert packed_metrics[name] == pytest.approx(metrics[name], rel=1e-4)


def test_evaluation_is_the_plain_task_loss(tmp_path):
    evaluated = {"eval_dataset": Dataset.from_list(completions(rows([5, 8, 6], seed=9)))}
    _, trainer = run_trl(SPEC, tmp_path / "on", defenses=strong(), **evaluated)
    with_defenses = trainer.evaluate()["eval_loss"]
    trainer.defenses = []
    assert trainer.evaluate()["eval_loss"] == with_defenses


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_makes_the_adapter(checkpointing, tmp_path):
    arguments = {"gradient_checkpointing": checkpointing, "learning_rate": 0.1}
    spec = {"batch": 2, "steps": 4, "arguments": arguments}
    results = []
    for defenses in ([], strong()):
        config = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
        trainer = run_trl(spec, tmp_path, model=tiny_model(), peft_config=config, defenses=defenses)[1]
        results.append(adapter_weights(trainer.model))
    metrics = [logs for logs in trainer.state.log_history if "defense/kl" in logs]
    assert metrics[0]["defense/kl"] == pytest.approx(0, abs=1e-6)
    assert metrics[-1]["defense/kl"] > 1e-4
    assert furthest(*results) > 1e-2
