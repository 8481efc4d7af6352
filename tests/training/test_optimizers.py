"""SafeLora with optimizers and callbacks that keep copies of the weights: the saved weights are the projected ones."""

from __future__ import annotations

import logging

import pytest
import torch
from odd_optimizers import InBackward, LayerWise, Lookahead, ScheduleFree, SwapsAtTheEnd, trained
from plain_loop import make_step
from safetensors.torch import load_file
from tiny_models import (
    adapter_weights,
    collate,
    fill_adapter,
    furthest,
    random_subspace,
    rows,
    save_pair,
    tiny_peft_model,
)
from train_runs import constant, run_transformers, sgd

from safelora_fast import project_adapter
from safelora_fast.defenses import KL, SafeLora
from safelora_fast.defenses.parts.safe_modules import SafeModules
from safelora_fast.errors import SettingsError, TrainingError
from safelora_fast.subspace.safe_subspace import SafeSubspace
from safelora_fast.trainers.transformers import DefendedTrainer
from safelora_fast.training import defend

BATCH = collate(rows([7, 3, 9, 4]))
OPTIONS = {"select": "all"}
SPEC = {"batch": 2, "accumulation": 2, "steps": 3}


def roundings_outside(model, subspace):
    """Return the largest ‖B - P·B‖ / ‖B‖, in units of float32 rounding."""
    return SafeModules(model.get_base_model(), subspace, owner="test").outside()


@pytest.fixture
def sources(tmp_path):
    return save_pair(tmp_path)


@pytest.fixture
def at_end(sources):
    return SafeLora(SafeSubspace.from_sources(**sources), **OPTIONS)


class Trainer(DefendedTrainer):
    """Creates its optimizer with `kind`."""

    kind = None

    def __init__(self, *args, optimizers, **kwargs):  # noqa: ARG002
        optimizer = self.kind(trained(kwargs["model"]))
        super().__init__(*args, optimizers=(optimizer, constant(optimizer)), **kwargs)


def with_optimizer(kind):
    return type("TrainerOf", (Trainer,), {"kind": staticmethod(kind)})


def run(kind, folder, *, defenses, model=None, arguments=None, **kwargs):
    spec = {**SPEC, "arguments": arguments or {}}
    return run_transformers(
        spec,
        folder,
        model=model,
        trainer_class=with_optimizer(kind),
        defenses=defenses,
        eval_dataset=rows([5, 4]),
        **kwargs,
    )


def saved_by(trainer, folder):
    trainer.save_model(str(folder))
    return load_file(folder / "adapter_model.safetensors")


def test_weights_for_evaluation_and_for_training_are_projected_at_a_step():
    model = tiny_peft_model()
    subspace, optimizer = random_subspace(model), ScheduleFree(trained(model))
    optimizer.train()
    with defend(model, [SafeLora(subspace, at="step", every=2)], optimizer=optimizer) as defended:
        for _ in range(4):
            make_step(optimizer, defended.loss(BATCH))
        for switch in (optimizer.eval, optimizer.train, optimizer.eval):
            switch()
            assert roundings_outside(model, subspace) < 8


def test_weights_of_another_name_are_noticed_at_the_first_step():
    model = tiny_peft_model()
    optimizer = ScheduleFree(trained(model), state_name="mine")
    optimizer.train()
    defended = defend(model, [SafeLora(random_subspace(model), at="step")], optimizer=optimizer)
    defended.attach()
    defended.loss(BATCH).backward()
    with pytest.raises(
        TrainingError, match=r"eval\(\) of ScheduleFree puts weights into the model that are not projected"
    ):
        optimizer.step()


def from_disk(model, sources, folder):
    model.save_pretrained(folder / "trained")
    project_adapter(folder / "trained", **sources, output=folder / "expected", **OPTIONS)
    return load_file(folder / "expected" / "adapter_model.safetensors")


def test_the_weights_for_evaluation_are_projected_at_the_end(sources, at_end, tmp_path):
    def train(defenses):
        model = tiny_peft_model()
        optimizer = ScheduleFree(trained(model))
        optimizer.train()
        with defend(model, defenses, optimizer=optimizer) as defended:
            for _ in range(3):
                make_step(optimizer, defended.loss(BATCH))
        return model, optimizer

    plain, optimizer = train([])
    optimizer.eval()
    expected = from_disk(plain, sources, tmp_path)
    model, optimizer = train([at_end])
    for switch in (optimizer.eval, optimizer.train, optimizer.eval, lambda: None):
        model.save_pretrained(tmp_path / "saved")
        found = load_file(tmp_path / "saved" / "adapter_model.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        switch()


@pytest.mark.parametrize("state_name", ["z", "mine"])
def test_evaluation_after_training_brings_nothing_back(sources, tmp_path, state_name):
    """Same order as the `train` command with `data.eval`: train, evaluate, save."""
    zero = SafeLora(SafeSubspace.from_sources(**sources), operator="zero", select="all")
    _, trainer = run(lambda p: ScheduleFree(p, state_name=state_name), tmp_path / "run", defenses=[zero])
    trainer.evaluate()
    saved = saved_by(trainer, tmp_path / "saved")
    assert len(trainer.projection_report.adapters[0].projected) == 21
    assert max(tensor.abs().max() for key, tensor in saved.items() if "lora_B" in key) == 0


def test_the_best_model_is_projected_whatever_the_optimizer_holds(sources, at_end, tmp_path):
    arguments = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # selects the worst checkpoint, which is not the last one
    }
    _, trainer = run(ScheduleFree, tmp_path / "run", defenses=[at_end], arguments=arguments)
    best = tmp_path / "run" / trainer.state.best_model_checkpoint.rpartition("/")[2]
    assert best.name != "checkpoint-3"
    project_adapter(best, **sources, output=tmp_path / "expected", **OPTIONS)
    expected = load_file(tmp_path / "expected" / "adapter_model.safetensors")
    trainer.evaluate()
    found = saved_by(trainer, tmp_path / "saved")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_an_optimizer_that_brings_weights_back_unasked_is_refused_when_saving(at_end, tmp_path):
    _, trainer = run(lambda p: ScheduleFree(p, state_name="mine"), tmp_path / "run", defenses=[at_end])
    trainer.optimizer.train()
    with pytest.raises(TrainingError, match=r"lora_A.weight and 41 other factors have changed since the projection"):
        trainer.save_model(str(tmp_path / "saved"))


@pytest.mark.parametrize("told", [False, True])
def test_steps_in_backward_in_a_loop(told):
    model = tiny_peft_model()
    subspace, optimizer = random_subspace(model), InBackward(trained(model))
    defended = defend(model, [SafeLora(subspace, at="step")], optimizer=optimizer)
    defended.attach()
    for number in range(2):
        if not told and number == 1:
            with pytest.raises(TrainingError, match=r"no step of the optimizer was seen.*engine_stepped"):
                defended.loss(BATCH)
            return
        optimizer.fused_backward(defended.loss(BATCH), lr=0.05)
        if told:
            defended.engine_stepped()
    assert (defended.step, roundings_outside(model, subspace) < 8) == (2, True)


def test_one_unseen_step_is_noticed_at_the_end():
    model = tiny_peft_model()
    optimizer = InBackward(trained(model))
    with (
        pytest.raises(TrainingError, match="no step of the optimizer was seen"),
        defend(model, [SafeLora(random_subspace(model), at="step")], optimizer=optimizer) as defended,
    ):
        optimizer.fused_backward(defended.loss(BATCH), lr=0.05)


def test_a_step_that_asks_for_the_loss_again_is_not_an_unseen_step():
    model = tiny_peft_model()
    optimizer = torch.optim.LBFGS(trained(model), lr=0.05, max_iter=3)
    defended = defend(model, [SafeLora(random_subspace(model), at="step")], optimizer=optimizer)
    defended.attach()

    def loss():
        optimizer.zero_grad()
        result = defended.loss(BATCH)
        result.backward()
        return result

    with pytest.raises(TrainingError, match=r"LBFGS asks for the loss several times in one step.*or at=\"end\""):
        optimizer.step(loss)


def test_a_scaler_that_leaves_a_step_out_is_no_unseen_step():
    model = tiny_peft_model()
    subspace, optimizer, scaler = random_subspace(model), sgd(model), torch.amp.GradScaler("cpu")
    with defend(model, [SafeLora(subspace, at="step")], optimizer=optimizer) as defended:
        for factor in (float("inf"), 1.0):
            scaler.scale(defended.loss(BATCH) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert (defended.step, roundings_outside(model, subspace) < 8) == (1, True)


def test_steps_in_backward_in_a_trainer(tmp_path):
    model = tiny_peft_model()
    subspace = random_subspace(model)
    _, trainer = run(InBackward, tmp_path, model=model, defenses=[SafeLora(subspace, at="step")])
    assert trainer.state.global_step == 3
    assert roundings_outside(model, subspace) < 8


def test_a_step_in_backward_cannot_be_skipped():
    model = tiny_peft_model()
    with pytest.raises(SettingsError, match="hooks before its steps, which DeepSpeed's and LOMO lack"):
        defend(model, [KL(1.0)], optimizer=InBackward(trained(model)), on_nonfinite="skip").attach()


def test_layer_wise_optimizers_are_refused_at_a_step():
    model = tiny_peft_model()
    with pytest.raises(SettingsError, match="layer-wise optimizers, which step in backward, are not supported"):
        defend(model, [SafeLora(random_subspace(model), at="step")], optimizer=LayerWise()).attach()


def test_slow_weights_are_projected_too(tmp_path):
    """Otherwise they would return at the next mixing step, which hooks on the inner optimizer do not see."""
    model = tiny_peft_model()
    subspace = random_subspace(model)
    kind = lambda parameters: Lookahead(torch.optim.SGD(parameters, lr=0.05))  # noqa: E731
    _, trainer = run(kind, tmp_path, model=model, defenses=[SafeLora(subspace, at="step")])
    assert roundings_outside(model, subspace) < 8
    optimizer = trainer.optimizer.optimizer
    for parameter, state in optimizer.state.items():
        parameter.data.copy_(state["slow_buffer"])
    assert roundings_outside(model, subspace) < 8


def test_averages_that_a_callback_puts_in_at_the_end_are_projected(sources, at_end, tmp_path, caplog):
    _, plain = run_transformers(SPEC, tmp_path / "plain", defenses=[], callbacks=[SwapsAtTheEnd()])
    expected = from_disk(plain.model, sources, tmp_path)
    with caplog.at_level(logging.WARNING, logger="safelora_fast"):
        _, trainer = run_transformers(SPEC, tmp_path / "run", defenses=[at_end], callbacks=[SwapsAtTheEnd()])
    found = saved_by(trainer, tmp_path / "saved")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert "other weights were put into the model after its projection: they are projected now" in caplog.text


def test_averages_of_a_part_are_refused(at_end, tmp_path):
    """A second projection would project the other weights twice."""
    with pytest.raises(TrainingError, match=r"layers\.1\..* have changed since the projection"):
        run_transformers(SPEC, tmp_path, defenses=[at_end], callbacks=[SwapsAtTheEnd(only="layers.1.")])


def test_averages_at_the_end_lie_in_the_subspace_at_a_step(tmp_path, caplog):
    class Before(SwapsAtTheEnd):
        """Includes the weights before training in the average."""

        def on_train_begin(self, *args, **kwargs):
            self.on_step_end(*args, **kwargs)

    model = tiny_peft_model()
    subspace = random_subspace(model)
    with caplog.at_level(logging.WARNING, logger="safelora_fast"):
        run_transformers(SPEC, tmp_path, model=model, defenses=[SafeLora(subspace, at="step")], callbacks=[Before()])
    assert roundings_outside(model, subspace) < 8
    assert "outside of the safe subspace" in caplog.text


def test_training_on_after_the_projection_ends_with_another_one(sources, at_end, tmp_path):
    def train(defenses, again):
        model = tiny_peft_model()
        optimizer = sgd(model)
        with defend(model, defenses, optimizer=optimizer) as defended:
            defended.finish()
            again(model)
            make_step(optimizer, defended.loss(BATCH))
        return model

    middle = adapter_weights(train([at_end], lambda _model: None))
    plain = tiny_peft_model()
    fill_adapter(plain, seed=8)
    make_step(sgd(plain), defend(plain, []).loss(BATCH))
    expected = from_disk(plain, sources, tmp_path)
    found = train([at_end], lambda model: fill_adapter(model, seed=8))
    assert furthest(adapter_weights(found), middle) > 0.1
    found.save_pretrained(tmp_path / "found")
    saved = load_file(tmp_path / "found" / "adapter_model.safetensors")
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
