"""The margin callback: the steps at which it measures, the logged values, and the warning."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from demo_model import tokenizer
from tiny_recipe import write_recipe, write_rows
from transformers import TrainingArguments

from safelora_fast import MarginCallback, answer_margin
from safelora_fast.data.pairs import Pair
from safelora_fast.errors import SettingsError
from safelora_fast.trainers.transformers import DefendedTrainer

PAIRS = [Pair(str(number), f"{number}?", "good and well", "bad and ill") for number in range(6)]


def trained(tmp_path, *, every, answer, steps=12):
    from demo_model import save_tiny
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "model"))
    words = tokenizer()
    rows = []
    for number in range(6):
        ids = words(f"<user>{number}?<assistant>{answer}")["input_ids"]
        rows.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)})
    trainer = DefendedTrainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path / "out"), max_steps=steps, per_device_train_batch_size=2, learning_rate=0.02,
            report_to="none", use_cpu=True, logging_steps=4, save_strategy="no", disable_tqdm=True, seed=0,
        ),
        train_dataset=Dataset.from_list(rows),
        defenses=[],
    )  # fmt: skip
    callback = MarginCallback(trainer, words, every=every, pairs=PAIRS)
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def margins(trainer):
    return {entry["step"]: entry for entry in trainer.state.log_history if "margin/mean" in entry}


def test_a_model_that_learns_misaligned_answers_is_warned_of_once(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="safelora_fast")
    trainer, callback = trained(tmp_path, every=5, answer="bad and ill")
    logged = margins(trainer)
    assert list(logged) == [0, 5, 10, 12]
    assert list(callback.reports) == [0, 5, 10, 12]
    assert logged[0]["margin/change"] == 0
    assert logged[12]["margin/mean"] > logged[0]["margin/mean"] + 0.5
    assert logged[12]["margin/share"] == 1.0
    assert logged[12]["margin/change"] == pytest.approx(logged[12]["margin/mean"] - logged[0]["margin/mean"])
    now = answer_margin(trainer.model, tokenizer(), PAIRS)
    assert now.margin == pytest.approx(logged[12]["margin/mean"], rel=1e-4)
    (told,) = [record.getMessage() for record in caplog.records if "misalignment margin" in record.getMessage()]
    assert "by step 5" in told


def test_a_model_that_learns_aligned_answers_is_not(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="safelora_fast")
    trainer, _ = trained(tmp_path, every=100, answer="good and well")
    logged = margins(trainer)
    assert list(logged) == [0, 12]
    assert logged[12]["margin/change"] < -0.5
    assert not [record for record in caplog.records if "misalignment margin" in record.getMessage()]


def test_measuring_leaves_training_as_it_was(tmp_path):
    often, _ = trained(tmp_path / "often", every=1, answer="good and well", steps=4)
    never, _ = trained(tmp_path / "never", every=100, answer="good and well", steps=4)
    for one, other in zip(often.model.parameters(), never.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_recipe_measures_it(tmp_path, call):
    pairs = write_rows(tmp_path / "pairs.jsonl", [vars(pair) for pair in PAIRS])
    tiny = write_recipe(tmp_path / "run", margin={"every": 4, "pairs": str(pairs)})
    result = call(*tiny.words())
    assert result.code == 0, result.err
    metrics = tiny.record()["metrics"]
    assert metrics["margin/change"]["first"] == 0
    assert metrics["margin/mean"]["last"] - metrics["margin/mean"]["first"] == pytest.approx(
        metrics["margin/change"]["last"]
    )
    assert tiny.record()["recipe"]["margin"] == {"every": 4, "pairs": str(pairs), "system": None, "stop": None}
    assert "margin/mean" in result.out
    dry = call(*tiny.words("--dry-run"))
    assert "every 4 steps over 6 pairs" in dry.out


def test_what_is_refused(tmp_path, call):
    with pytest.raises(SettingsError, match="margin: every is 0"):
        MarginCallback(None, tokenizer(), every=0)
    tiny = write_recipe(tmp_path / "run", margin={"every": 0})
    assert "margin.every: must be at least 1, not 0" in call(*tiny.words("--dry-run")).err
    tiny = write_recipe(tmp_path / "other", margin={"pairs": str(tmp_path / "none.jsonl")})
    assert "none.jsonl: the data cannot be read" in call(*tiny.words("--dry-run")).err
