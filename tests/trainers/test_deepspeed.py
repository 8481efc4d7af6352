"""DeepSpeed with ZeRO stages 1 and 2: the same weights as a plain loop, projections included."""

from __future__ import annotations

import pytest
import torch
from tiny_models import furthest, random_subspace, tiny_peft_model
from train_runs import deepspeed_config, run, run_transformers, run_two_processes

from safelora_fast.defenses import KL
from safelora_fast.errors import SettingsError

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

STRONG = {"kl": 30.0, "feature_distance": 30.0, "subspace_penalty": 0.3, "safelora": 1}
SPEC = {"batch": 2, "accumulation": 2, "steps": 2, "defenses": STRONG}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Weights and metrics of two steps in a plain loop. The second step shows whether the first projection persisted."""
    return run({"kind": "loop", "batch": 8, "steps": 2, "defenses": STRONG}, tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", ["deepspeed", "transformers"])
def test_two_processes(plain, kind, stage, tmp_path):
    spec = {**SPEC, "kind": kind, "stage": stage}
    if kind == "transformers":
        arguments = {"learning_rate": 0.02, "lr_scheduler_type": "constant", "logging_steps": 2}
        spec["arguments"] = {**arguments, "deepspeed": deepspeed_config(spec)}
    weights, metrics = run_two_processes(spec, tmp_path)
    assert furthest(weights, plain[0]) < 1e-5
    assert metrics.get("rounding", 0.0) == 0
    for name in ("kl", "feature_distance", "subspace_penalty", "cosine_min", "modules_projected"):
        assert metrics[f"defense/{name}"] == pytest.approx(plain[1][f"defense/{name}"], rel=1e-4)


@pytest.mark.slow
def test_bfloat16_is_projected_in_float32(tmp_path):
    """DeepSpeed's float32 copy is projected. Rounding it to bfloat16 moves the weights out of the subspace by 1e-3."""
    weights, metrics = run_two_processes({**SPEC, "kind": "deepspeed", "stage": 2, "bf16": True}, tmp_path)
    assert 0 < metrics["rounding"] < 4e-3
    subspace = random_subspace(tiny_peft_model(), rank=20, seed=1)
    for name, module in subspace.modules.items():
        left = weights[f"base_model.model.{name}.lora_B.default.weight"]
        vectors = torch.from_numpy(module.left_vectors)
        assert (left - vectors @ (vectors.T @ left)).norm() < 1e-6 * left.norm()


@pytest.mark.parametrize("stage", [0, 3])
def test_other_stages_are_refused(stage, tmp_path):
    spec = {"batch": 2, "accumulation": 1, "stage": stage}
    spec["arguments"] = {"deepspeed": deepspeed_config(spec), "learning_rate": 0.02}
    with pytest.raises(SettingsError, match="ZeRO stages 1 and 2"):
        run_transformers(spec, tmp_path, model=tiny_peft_model(), defenses=[KL(1.0)])
