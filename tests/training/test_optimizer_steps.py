"""Skipped optimizer steps, their log messages, and steps without a loss of the defenses."""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager

import pytest
import torch
from odd_optimizers import InBackward, trained
from plain_loop import make_step
from tiny_models import adapter_weights, collate, furthest, random_subspace, rows, tiny_peft_model
from train_runs import sgd

from safelora_fast.defenses import KL, DriftMonitor, FeatureDistance, SafeLora, Steering, SubspacePenalty
from safelora_fast.training import defend

WINDOW = [collate(rows([7, 3])), collate(rows([9, 4], seed=4))]
VECTOR = torch.linspace(-1, 1, 32)


class Breakable:
    """A model whose reference pass gives NaN while `broken` is true."""

    def __init__(self):
        self.model, self.broken = tiny_peft_model(), False
        self.model.get_base_model().model.layers[0].register_forward_hook(self._hook)

    def _hook(self, _module, _inputs, output):
        return output * float("nan") if self.broken and not torch.is_grad_enabled() else None

    def add_up(self, defended, states, totals):
        for batch, self.broken in zip(WINDOW, states, strict=True):
            defended.loss(batch, totals=totals).backward()


@pytest.mark.parametrize("with_totals", [True, False])
@pytest.mark.parametrize("broken", [[True, False], [False, True], [True, True], [False, False]])
def test_a_window_with_a_broken_micro_batch_is_left_out_whole(with_totals, broken):
    """Without totals each micro-batch is a separate window, but gradients still accumulate."""
    given = Breakable()
    optimizer = sgd(given.model)
    with defend(given.model, [KL(3.0)], optimizer=optimizer, on_nonfinite="skip", share_logits=False) as defended:
        for states in (broken, [False, False]):
            before = adapter_weights(given.model)
            given.add_up(defended, states, defended.totals(WINDOW) if with_totals else None)
            optimizer.step()
            optimizer.zero_grad()
            assert (furthest(before, adapter_weights(given.model)) > 0) == (not any(states))


def test_metrics_are_means_over_the_steps_that_were_made():
    given = Breakable()
    optimizer = sgd(given.model, lr=0.0)
    settings = {"on_nonfinite": "skip", "monitors": [DriftMonitor(VECTOR, layer=1)], "share_logits": False}
    with defend(given.model, [KL(3.0)], optimizer=optimizer, **settings) as defended:

        def steps(broken):
            for first in broken:
                given.add_up(defended, (first, False), defended.totals(WINDOW))
                optimizer.step()
                optimizer.zero_grad()
            return defended.metrics()

        one, several = steps([False]), steps([True, False, False, True])
        assert several["defense/kl"] == pytest.approx(one["defense/kl"], rel=1e-12)
        assert several["monitor/drift"] == pytest.approx(one["monitor/drift"], rel=1e-12)
        assert several["defense/steps_skipped"] == 2
        assert "defense/kl" not in steps([True])


def test_monitors_forget_a_model_that_was_not_finite():
    model = tiny_peft_model()
    optimizer, broken = sgd(model, lr=0.0), [False]
    model.get_base_model().model.layers[0].register_forward_hook(
        lambda _m, _a, out: out * float("nan") if broken[0] else out
    )
    monitor = DriftMonitor(VECTOR, layer=1)
    with defend(model, [KL(3.0)], optimizer=optimizer, on_nonfinite="skip", monitors=[monitor]) as defended:
        for broken[0] in (False, True):
            make_step(optimizer, defended.loss(WINDOW[0]))
        assert not any(math.isnan(value) for value in defended.metrics().values())


@contextmanager
def watched(caplog, model, defenses, **settings):
    """Defend a model, and capture its warnings."""
    with caplog.at_level(logging.WARNING, logger="safelora_fast"), defend(model, defenses, **settings) as defended:
        yield defended


def warned(caplog):
    return [record.message for record in caplog.records if "without the loss of the defenses" in record.message]


def plain_step(model, optimizer):
    make_step(optimizer, model(**WINDOW[0]).loss)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", [KL, FeatureDistance, SubspacePenalty])
def test_steps_without_a_loss_are_worth_one_warning(kind, given, caplog):
    model = tiny_peft_model()
    optimizer = sgd(model)
    arguments = {FeatureDistance: {"layers": 2}, SubspacePenalty: {"subspace": random_subspace(model)}}
    defense = kind(**arguments.get(kind, {}))
    with watched(caplog, model, [defense], optimizer=optimizer if given else None):
        for _ in range(3):
            plain_step(model, optimizer)
    (message,) = warned(caplog)
    assert f"so {kind.__name__} did nothing" in message
    plain_step(model, optimizer)
    assert len(warned(caplog)) == 1


def test_a_loss_that_is_asked_for_only_sometimes(caplog):
    model = tiny_peft_model()
    optimizer, other = sgd(model), torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with watched(caplog, model, [KL(1.0)], optimizer=optimizer) as defended:
        defended.loss(WINDOW[0]).backward()
        other.step()
        other.step()  # its parameters do not belong to the model
        optimizer.step()
        assert not warned(caplog)
        plain_step(model, optimizer)
    assert len(warned(caplog)) == 1


def test_two_optimizers_of_one_model_share_a_loss(caplog):
    model = tiny_peft_model()
    halves = [torch.optim.SGD(trained(model)[start::2], lr=0.01) for start in (0, 1)]
    with watched(caplog, model, [KL(1.0)]) as defended:
        for _ in range(2):
            defended.loss(WINDOW[0]).backward()
            for optimizer in halves:
                optimizer.step()
    assert not warned(caplog)


def test_an_engines_steps_without_a_loss(caplog):
    model = tiny_peft_model()
    optimizer = InBackward(trained(model))
    with watched(caplog, model, [KL(1.0)], optimizer=optimizer) as defended:
        optimizer.fused_backward(model(**WINDOW[0]).loss, lr=0.01)
        defended.engine_stepped()
    assert len(warned(caplog)) == 1


def test_defenses_that_need_no_loss(caplog):
    model = tiny_peft_model()
    optimizer = sgd(model)
    with watched(
        caplog, model, [Steering(VECTOR, 1), SafeLora(random_subspace(model), at="step")], optimizer=optimizer
    ):
        plain_step(model, optimizer)
    assert not caplog.records
