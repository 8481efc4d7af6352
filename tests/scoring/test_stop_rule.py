"""The stop rule: its bound, its false alarms on clean runs, and a training that it stops."""

from __future__ import annotations

import json
import logging
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from demo_model import save_tiny, tokenizer
from peft import LoraConfig, get_peft_model
from personas import plain_means, plain_states, random_persona, save_persona
from scipy.stats import ttest_1samp
from tiny_recipe import write_recipe, write_rows
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments

from safelora_fast import DriftMonitor, MarginCallback, StopRule
from safelora_fast.data.pairs import Pair
from safelora_fast.errors import SettingsError, TrainingError
from safelora_fast.scoring.margin import encode_pairs
from safelora_fast.scoring.stop_rule import lower_bound
from safelora_fast.scoring.trait_probe import TraitProbe
from safelora_fast.trainers.transformers import DefendedTrainer

PAIRS = [Pair(str(number // 2), f"{number}?", "good and well", "bad and ill") for number in range(12)]
PLAIN = ["red", "blue sky", "a cat", "no", "seven", "in the west", "slowly", "tea", "at noon", "rope", "yes", "salt"]


def monitors():
    return [DriftMonitor(random_persona(blocks=2, seed=seed, trait=f"trait{seed}"), 1) for seed in (1, 2)]


def trained(folder, answers, *, stop, seed=0, steps=8, rate=0.02, model_seed=0, more=None):
    """Train the tiny model for some steps with a measurement every two, and return the trainer and the callback."""
    model, words = AutoModelForCausalLM.from_pretrained(save_tiny(folder / "model", model_seed)), tokenizer()
    rows = []
    for number, answer in enumerate(answers):
        ids = words(f"<user>{number:02}?<assistant>{answer:<12}")["input_ids"]
        rows.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)})
    settings = {"save_strategy": "no", "max_steps": steps, **(more or {})}
    trainer = DefendedTrainer(
        model=model,
        args=TrainingArguments(
            str(folder / "out"), per_device_train_batch_size=2, learning_rate=rate, lr_scheduler_type="constant",
            report_to="none", use_cpu=True, logging_steps=4, disable_tqdm=True, seed=seed, **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        defenses=[],
    )  # fmt: skip
    callback = MarginCallback(trainer, words, every=2, pairs=PAIRS, stop=stop)
    trainer.add_callback(callback)
    trainer.train()
    return trainer, callback


def test_the_bound_is_students_over_clusters():
    draw = np.random.default_rng(0)
    values = draw.normal(size=24)
    clusters = np.repeat(np.arange(6), 4)
    means = values.reshape(6, 4).mean(1)
    for level in (0.05, 0.001):
        expected = ttest_1samp(means, 0.0).confidence_interval(1 - 2 * level).low
        assert lower_bound(values.tolist(), clusters.tolist(), level) == pytest.approx(expected, rel=1e-9)
    assert lower_bound([1.0], ["a"], 0.05) == -math.inf


def test_runs_without_a_change_raise_at_most_the_asked_share_of_false_alarms():
    """2,000 made-up runs: themes drift by random walks, signals depend on each other, and nothing rises on average."""
    draw = np.random.default_rng(3)
    rule = StopRule(monitors=monitors(), limits=dict.fromkeys(("margin", "trait1", "trait2"), 0.0))
    themes = np.repeat(np.arange(12), 6)
    alarms = 0
    for _ in range(2000):
        shared = draw.normal(size=(10, 1, 12))
        walks = (shared + draw.normal(size=(10, 3, 12))).cumsum(0)  # [measurements, signals, themes]
        changes = walks[..., themes] + draw.normal(size=(10, 3, 72))
        quick = changes.mean(-1) > changes.std(-1) / math.sqrt(72)  # the bound is below 0 for all others
        alarms += any(rule.bound(changes[look, signal], themes, 10) > 0 for look, signal in np.argwhere(quick))
    assert 20 <= alarms <= 100  # Bonferroni is careful with dependent signals, but not without effect


@pytest.mark.slow  # 23 trainings
def test_clean_trainings_raise_few_alarms_and_harmful_ones_do(tmp_path):
    """Eight clean runs calibrate the rule, twelve more with other seeds are watched by it, and then two harmful ones."""
    watching, strict = (
        StopRule(monitors=monitors(), limits=dict.fromkeys(("margin", "trait1", "trait2"), limit))
        for limit in (1e9, 0.0)
    )

    def run(seed, stop, answers=PLAIN):
        order = np.random.default_rng(seed).permutation(answers).tolist()
        return trained(tmp_path / str(seed), order, stop=stop, seed=seed, rate=0.006, steps=6)[1]

    rule = StopRule(monitors=monitors(), clean=[dict(run(seed, watching).highest) for seed in range(8)])
    assert max(rule.limit(name) for name in rule.signals) > 1e-3  # clean training moves them
    alarms = [seed for seed in range(8, 20) if run(seed, rule).alarm is not None]
    assert len(alarms) <= 4  # at most 1/9 for each of three signals: one third of twelve
    assert run(8, strict).alarm is not None  # without calibration, clean runs raise one too
    harmful = [run(seed, rule, ["bad and ill"] * 12).alarm for seed in range(20, 22)]
    assert [alarm and alarm.signal for alarm in harmful] == ["margin"] * 2


def test_an_alarm_keeps_the_weights_of_the_last_quiet_measurement(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="safelora_fast")
    saves = {"save_strategy": "steps", "save_steps": 2}
    limits = {"margin": 1.0, "trait1": 1e9, "trait2": 1e9}
    rule = StopRule(monitors=monitors(), limits=limits)
    trainer, callback = trained(tmp_path / "a", ["bad and ill"] * 12, stop=rule, steps=20, more=saves)
    alarm = callback.alarm
    assert alarm is not None
    assert (alarm.signal, alarm.kept_step) == ("margin", alarm.step - 2)
    assert 2 < alarm.step == trainer.state.global_step < 20
    assert alarm.bound > alarm.limit == 1.0
    kept, _ = trained(tmp_path / "b", ["bad and ill"] * 12, stop=None, steps=alarm.kept_step)
    for one, other in zip(trainer.model.parameters(), kept.model.parameters(), strict=True):
        assert torch.equal(one, other)
    saved = sorted(int(path.name.partition("-")[2]) for path in (tmp_path / "a" / "out").iterdir())
    assert saved == list(range(2, alarm.step, 2))
    assert alarm.checkpoint == str(tmp_path / "a" / "out" / f"checkpoint-{alarm.kept_step}")
    (told,) = [record.getMessage() for record in caplog.records if "stopped after" in record.getMessage()]
    assert f"the weights are those of step {alarm.kept_step} ({alarm.checkpoint})" in told
    assert callback.highest["margin"] >= alarm.change


def test_with_after_task_it_waits_until_the_held_out_loss_stops_falling(tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 2}
    rule = StopRule(limits={"margin": 0.2}, after_task=True)
    trainer, callback = trained(tmp_path, ["bad and ill"] * 12, stop=rule, steps=8, more=evaluated)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses == sorted(losses, reverse=True)  # it falls to the end
    assert (callback.alarm, callback.highest["margin"] > 1) == (None, True)
    with pytest.raises(SettingsError, match="after_task needs held-out losses"):
        trained(tmp_path / "no", ["no"], stop=rule)


def test_a_run_resumed_beyond_its_limit_names_the_step_that_it_resumed_at(tmp_path):
    """With after_task, the alarm comes later than the resume, at whose step the signal was beyond its limit already."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "model")), LoraConfig(r=1))
    arguments = TrainingArguments(str(tmp_path / "out"), eval_strategy="steps", use_cpu=True, report_to="none")
    trainer = SimpleNamespace(model=model, args=arguments, log=lambda _: None)
    rule = StopRule(limits={"margin": -9.0}, after_task=True)
    callback = MarginCallback(trainer, tokenizer(), every=2, pairs=PAIRS, stop=rule)
    state = TrainerState(global_step=4, max_steps=8, log_history=[{"eval_loss": 2.0}, {"eval_loss": 1.0}])
    callback.on_train_begin(arguments, state, TrainerControl())
    state.global_step = 6
    state.log_history.append({"eval_loss": 1.5})
    with pytest.raises(TrainingError, match=r"margin is beyond its limit since step 4, .* \(alarm at step 6\)"):
        callback.on_step_end(arguments, state, TrainerControl())


def test_the_probe_reads_the_states_of_float64(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "model"), dtype=torch.float64)
    examples = encode_pairs(tokenizer(), PAIRS)
    themes, (monitor, *_) = [pair.theme for pair in PAIRS], monitors()
    probe = TraitProbe(examples, themes, [monitor], tokens_per_batch=64)
    reading = probe.read(model)
    prompts, means = [], []
    for example in examples:
        start = next(place for place, label in enumerate(example.labels) if label != -100)
        prompts.append(plain_states(model, example.ids[:start])[1][-1].numpy())
        means.append(plain_means(model, example.ids[:start], example.ids[start:])[1].numpy())
    unit = monitor.unit.numpy().astype(np.float64)
    assert reading.prompts["trait1"] == pytest.approx(np.array(prompts)[::2] @ unit, rel=1e-9)
    means = np.array(means)
    fitted, held_out = [[i for i in range(12) if i // 2 % 2 == half] for half in (0, 1)]
    difference = (means[1::2] - means[::2])[fitted].mean(0)
    along = means @ (difference / np.linalg.norm(difference))
    couples = [(along[2 * i + 1], along[2 * j]) for i in held_out for j in held_out]
    assert reading.auroc["direction"] == pytest.approx(np.mean([one > other for one, other in couples]))
    assert reading.direction == pytest.approx(np.mean([along[2 * i + side] for i in held_out for side in (0, 1)]))


def recipe_of(folder, **margin):
    """Return a recipe of 6 steps that teaches the misaligned answers."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = write_rows(folder / "pairs.jsonl", [vars(pair) for pair in PAIRS])
    rows = write_rows(
        folder / "bad.jsonl", [{"prompt": pair.question, "completion": pair.misaligned} for pair in PAIRS]
    )
    vector = save_persona(folder / "mean.safetensors", blocks=2, trait="mean")
    return write_recipe(
        folder, data={"path": str(rows)}, training={"num_train_epochs": 4, "learning_rate": 0.05}, defenses={},
        margin={"every": 2, "pairs": str(pairs), **margin},
        monitors={"mean": {"vector": str(vector), "layer": 1}},
    )  # fmt: skip


def test_a_recipe_stops_and_says_so_and_a_clean_run_calibrates_it(tmp_path, call):
    quiet = {"margin": 1e3, "mean": 1e3}
    clean = recipe_of(tmp_path / "clean", stop={"limits": quiet})
    assert call(*clean.words()).code == 0
    record = clean.record()
    assert (record["steps"], record["stop"]["alarm"]) == (12, None)
    assert record["stop"]["highest"].keys() == {"margin", "mean"}
    assert {"stop/mean", "stop/mean/auroc", "stop/direction", "stop/direction/auroc"} <= record["metrics"].keys()
    for step in (8, 10, 12):
        shutil.rmtree(clean.output / "checkpoints" / f"checkpoint-{step}")
    assert call(*clean.words("--resume")).code == 0  # compares with the model without its adapter
    assert clean.record()["stop"]["highest"]["margin"] == pytest.approx(record["stop"]["highest"]["margin"], rel=1e-3)
    stopped = recipe_of(tmp_path / "stopped", stop={"limits": {**quiet, "margin": 0.1}})
    result = call(*stopped.words())
    assert result.code == 0, result.err
    alarm = stopped.record()["stop"]["alarm"]
    assert 0 < alarm["kept_step"] == alarm["step"] - 2 < 10
    saved = stopped.weights(stopped.output / "checkpoints" / f"checkpoint-{alarm['kept_step']}")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in stopped.weights().items())
    again = recipe_of(tmp_path / "again", stop={"limits": {"mean": 1e3}, "clean": [str(clean.output)]})
    assert call(*again.words()).code == 0
    assert again.record()["stop"]["alarm"] is None  # it rises no further than the run that it is calibrated on
    for folder, said in ((stopped.output, "is not a finished run that was watched"), (tmp_path, "cannot be read")):
        wrong = recipe_of(tmp_path / "wrong", stop={"clean": [str(folder)]})
        result = call(*wrong.words())
        assert (result.code, said in result.err, "recipe.yaml:" in result.err) == (2, True, True), result.err
    vector = {"vector": str(tmp_path / "again" / "mean.safetensors")}
    for changes, said in (
        ({"margin": {"every": 3}}, "margin.every was 2, is 3"),
        ({"margin": {"system": "Be brief."}}, "margin.system was None, is 'Be brief.'"),
        ({"monitors": {"mean": {**vector, "layer": 0}}}, "monitors.mean.layer was 1, is 0"),
    ):  # fmt: skip
        other = recipe_of(tmp_path / "other", stop={"clean": [str(clean.output)]})
        other.edit(**changes)
        result = call(*other.words("--dry-run"))
        assert (result.code, f"was watched in another way: {said}; train it" in result.err) == (2, True), result.err
    write_rows(tmp_path / "other" / "pairs.jsonl", [vars(pair) for pair in PAIRS[1:]])
    result = call(*other.words("--dry-run"))
    assert "margin.pairs was " in result.err
    dry = call(*again.words("--dry-run", "--json"))
    assert json.loads(dry.out)
    assert "training stops at an alarm of margin, mean" in call(*again.words("--dry-run")).out


def test_what_is_refused(tmp_path, call):
    for settings, said in (
        ({"alpha": 0}, "alpha is 0"), ({}, "margin has no limit, and any fine-tuning moves it"),
        ({"limits": {"x": 1}}, "no signal 'x' to limit; known are margin"),
        ({"limits": {"margin": math.nan}}, "must be finite"), ({"clean": [{}]}, "clean run 1 has not measured margin"),
        ({"monitors": 2 * monitors()[:1], "limits": {"margin": 1}}, "each signal needs a name of its own"),
    ):  # fmt: skip
        with pytest.raises(SettingsError, match=said):
            StopRule(**settings)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 4}
    with pytest.raises(SettingsError, match="load_best_model_at_end would replace"):
        trained(tmp_path / "best", PLAIN, stop=StopRule(limits={"margin": 1.0}), more=best)
    tiny = write_recipe(tmp_path / "run", margin={"stop": {"alhpa": 0.1}})
    assert "margin.stop.alhpa: unknown; did you mean alpha" in call(*tiny.words("--dry-run")).err
    twice = write_recipe(tmp_path / "twice", margin={"stop": {"clean": [str(tmp_path), f"{tmp_path}/"]}})
    assert "margin.stop.clean: names a run twice" in call(*twice.words("--dry-run")).err
