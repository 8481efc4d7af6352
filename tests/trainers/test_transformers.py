"""DefendedTrainer and the mixin: evaluation, defenses switched off, resume, bypassed losses, errors."""

from __future__ import annotations

import pytest
import torch
from tiny_models import adapter_weights, collate, furthest, random_subspace, rows, tiny_model, tiny_peft_model
from train_runs import run_transformers, trainer_arguments
from transformers import Trainer, TrainingArguments

from safelora_fast.defenses import KL, FeatureDistance, SafeLora, Steering, SubspacePenalty
from safelora_fast.errors import SettingsError, TrainingError
from safelora_fast.trainers.transformers import DefendedMixin, DefendedTrainer

SPEC = {"batch": 2, "accumulation": 2, "steps": 3, "model": {"dropout": 0.2}}


def strong():
    return [KL(30.0), FeatureDistance(30.0, layers=2)]


def test_off_means_off(tmp_path):
    plain, _ = run_transformers(SPEC, tmp_path / "plain", trainer_class=Trainer)
    for defenses in ([], [KL(0.0), FeatureDistance(0.0)]):
        off, trainer = run_transformers(SPEC, tmp_path / "off", defenses=defenses)
        assert furthest(adapter_weights(plain), adapter_weights(off)) == 0
        assert not any(name.startswith("defense/") for logs in trainer.state.log_history for name in logs)
    on, _ = run_transformers(SPEC, tmp_path / "on", defenses=strong())
    assert furthest(adapter_weights(plain), adapter_weights(on)) > 1e-2


def test_evaluation_is_the_plain_task_loss_and_metrics_are_logged(tmp_path):
    spec = {**SPEC, "arguments": {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}}
    evaluated = {"eval_dataset": rows([5, 8, 6], seed=9)}
    _, trainer = run_transformers(spec, tmp_path / "on", defenses=strong(), **evaluated)
    losses = [logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs]
    plain = Trainer(
        model=tiny_peft_model(dropout=0.2),
        args=TrainingArguments(**trainer_arguments(SPEC, tmp_path / "plain")),
        data_collator=collate,
        **evaluated,
    )
    assert losses[0] == plain.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == losses[-1]
    for logs in trainer.state.log_history:
        if "loss" in logs:
            assert logs["defense/kl"] > 0
            assert logs["defense/feature_distance"] > 0
            assert 0 < logs["defense/time_share"] < 1


@pytest.mark.parametrize("checkpoint", [1, 2])
def test_a_resumed_run_gives_the_weights_of_an_unbroken_one(checkpoint, tmp_path):
    """Resumes between two projections and right after one, with dropout and steering."""
    arguments = {"save_strategy": "steps", "save_steps": checkpoint, "logging_steps": 5}
    spec = {**SPEC, "steps": 4, "arguments": arguments}

    def train(folder, **settings):
        model = tiny_peft_model(**SPEC["model"])
        penalty = SubspacePenalty(random_subspace(model, seed=1), 0.1)
        projection = SafeLora(random_subspace(model), at="step", every=2)
        defenses = [*strong(), penalty, projection, Steering([0.5] * 32, 1, 2.0)]
        return run_transformers({**spec, **settings}, folder, model, defenses=defenses)

    unbroken, _ = train(tmp_path / "run")
    resumed, trainer = train(tmp_path / "again", resume=str(tmp_path / "run" / f"checkpoint-{checkpoint}"))
    assert trainer.state.global_step == 4
    assert furthest(adapter_weights(unbroken), adapter_weights(resumed)) == 0


def test_the_model_has_no_hooks_after_training(tmp_path):
    model, _ = run_transformers(SPEC, tmp_path, defenses=strong())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.get_base_model().modules())


class HalfLossTrainer(Trainer):
    """A user-defined trainer."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        return (result[0] / 2, result[1]) if return_outputs else result / 2


class DefendedHalfLossTrainer(DefendedMixin, HalfLossTrainer):
    pass


class BypassingTrainer(DefendedMixin, Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):  # noqa: ARG002
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_mixin_on_a_users_trainer(tmp_path):
    """Half the task loss plus a defense gives half the step of the full task loss plus twice that defense."""
    spec = {"batch": 4, "accumulation": 2}
    half, _ = run_transformers(spec, tmp_path / "a", trainer_class=DefendedHalfLossTrainer, defenses=[KL(15.0)])
    whole, _ = run_transformers(spec, tmp_path / "b", defenses=[KL(30.0)])
    start = adapter_weights(tiny_peft_model())
    for name, value in adapter_weights(half).items():
        moved, expected = value - start[name], (adapter_weights(whole)[name] - start[name]) / 2
        assert (moved - expected).abs().max() < 1e-5


def test_a_trainer_that_hands_everything_on_by_position(tmp_path):
    class ByPosition(DefendedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    spec = {"batch": 4, "accumulation": 2}
    ours, _ = run_transformers(spec, tmp_path / "a", trainer_class=ByPosition, defenses=strong())
    plain, _ = run_transformers(spec, tmp_path / "b", defenses=strong())
    assert furthest(adapter_weights(ours), adapter_weights(plain)) == 0


def test_a_loss_that_bypasses_the_defenses_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"BypassingTrainer\.compute_loss bypasses"):
        run_transformers(SPEC, tmp_path, trainer_class=BypassingTrainer, defenses=strong())


def test_models_without_loss_arguments_are_scaled_alike(tmp_path):
    """If the Trainer itself divides by the accumulation steps, the defense must not become smaller."""

    class Divided(DefendedTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = False

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)

    even = {"lengths": [6] * 8}
    divided, _ = run_transformers(
        {"batch": 2, "accumulation": 4, **even}, tmp_path / "a", trainer_class=Divided, defenses=strong()
    )
    whole, _ = run_transformers({"batch": 8, **even}, tmp_path / "b", defenses=strong())
    assert furthest(adapter_weights(divided), adapter_weights(whole)) < 1e-5


def test_not_finite_stops_the_run(tmp_path):
    model = tiny_peft_model()
    model.get_base_model().model.layers[0].register_forward_hook(
        lambda _m, _a, out: out * float("nan") if not torch.is_grad_enabled() else out
    )
    with pytest.raises(TrainingError, match=r"(feature_distance|kl) .*step 1.*layer 0 of the reference"):
        run_transformers(SPEC, tmp_path, model=model, defenses=[*strong(), Steering(torch.ones(32), 1)])
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 1


def test_refusals_come_with_the_trainer(tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match="no adapter to disable"):
        run_transformers(SPEC, tmp_path, model=tiny_model(), defenses=strong())
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")  # as set by accelerate's launcher
    with pytest.raises(SettingsError, match="torch_compile"):
        run_transformers(SPEC, tmp_path, defenses=strong())
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    spec = {**SPEC, "arguments": {"torch_compile": True}}  # may set the variable; monkeypatch restores it
    with pytest.raises(SettingsError, match="torch_compile"):
        run_transformers(spec, tmp_path, defenses=strong())


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    """The Trainer would wrap the model in DataParallel."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    with pytest.raises(SettingsError, match="DataParallel, which drops the defenses' hooks"):
        run_transformers(SPEC, tmp_path, defenses=strong())
