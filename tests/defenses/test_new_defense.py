"""A defense defined in this file alone works in a loop, in both trainers, in recipes and dry runs, and in model cards."""

from __future__ import annotations

import pytest
import torch
from tiny_models import collate, rows, tiny_peft_model
from tiny_recipe import write_recipe
from train_runs import run_transformers, run_trl, sgd

import safelora_fast
from safelora_fast.defenses import KL, BatchDefense, base
from safelora_fast.defenses.step_cost import Extra
from safelora_fast.errors import SettingsError
from safelora_fast.training import defend


class CountsSteps(base.Attached):
    def __init__(self, run):
        self.run = run

    def after_step(self):
        self.run.metrics["anchor_steps"] = float(self.run.steps_seen)


@pytest.fixture(autouse=True)
def last_state_anchor(monkeypatch):
    """The defense class, registered only while a test runs."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))

    class LastStateAnchor(BatchDefense):
        """Keeps the last hidden states where they were."""

        name = "last_state_anchor"

        def __init__(self, weight: float = 1.0, power: int = 2) -> None:
            super().__init__(weight)
            self.power = power

        def __repr__(self):
            return f"LastStateAnchor(weight={self.weight}, power={self.power})"

        def units(self, spans):
            return int(self.mask(spans).sum())

        def loss(self, observation):
            moved = observation.student.hidden - observation.reference.hidden
            return moved.norm(dim=-1)[self.mask(observation.spans)].pow(self.power).sum()

        def attach(self, run):
            return CountsSteps(run)

        def cost(self, shape, work):
            return Extra(3e3 * shape.hidden * work.tokens, 1e6, "one subtraction of states")

        def card_line(self, report):
            return f"{super().card_line(report)}, to the power of {self.power}"

    return LastStateAnchor


def test_in_a_loop(last_state_anchor):
    model, batch = tiny_peft_model(), collate(rows([7, 3, 5]))
    optimizer = sgd(model)
    with torch.no_grad():
        task = model(**batch).loss
        states = [model(**batch, output_hidden_states=True).hidden_states[-1]]
        with model.disable_adapter():
            states.append(model(**batch, output_hidden_states=True).hidden_states[-1])
        mean = (states[0] - states[1]).norm(dim=-1)[batch["attention_mask"] != 0].pow(2).mean()
    with defend(model, [last_state_anchor(3.0), KL(0.0)], optimizer=optimizer) as defended:
        loss = defended.loss(batch)
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx((task + 3.0 * mean).item(), rel=1e-5)
        metrics = defended.metrics()
    assert metrics["defense/last_state_anchor"] == pytest.approx(mean.item(), rel=1e-5)
    assert metrics["defense/anchor_steps"] == 1


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets it
@pytest.mark.parametrize("train", [run_transformers, run_trl])
def test_in_the_trainers_and_their_cards(train, last_state_anchor, tmp_path):
    _, trainer = train({"batch": 4, "steps": 1}, tmp_path / "run", defenses=[last_state_anchor(2.0)])
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["defense/last_state_anchor"] > 0
    assert logged["defense/anchor_steps"] == 1
    trainer.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "- `LastStateAnchor(weight=2.0, power=2)`, to the power of 2\n" in card


def test_in_a_recipe(tmp_path, call):
    tiny = write_recipe(tmp_path, defenses={"kl": False, "last_state_anchor": {"power": 1}})
    plan = call("train", tiny.path, "--dry-run").out
    assert "last_state_anchor: weight 1, power 1" in plan
    assert "one subtraction of states: ≈ +" in plan
    result = call("train", tiny.path)
    assert result.code == 0, result.err
    card = (tiny.output / "README.md").read_text(encoding="utf-8")
    assert "Keeps the last hidden states where they were." in card
    assert call("train", tiny.path, "defenses.last_state_anchor.powr=1").err.endswith("did you mean power\n")


def test_its_name_is_public_and_its_own(last_state_anchor):
    assert safelora_fast.LastStateAnchor is last_state_anchor
    assert "LastStateAnchor" in safelora_fast.__all__
    with pytest.raises(
        SettingsError, match=r"the name 'last_state_anchor' is that of .*LastStateAnchor: choose another"
    ):
        type("Other", (KL,), {"name": "last_state_anchor"})
    assert not hasattr(safelora_fast, "Other")
