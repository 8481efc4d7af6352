"""`data.safe` and `data.inoculate`: the training mixture, its description in the plan, and its errors."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from tiny_recipe import tiny_rows, write_recipe, write_rows
from train_runs import trl_fuses_the_head
from transformers import TrainingArguments

from safelora_fast.errors import DataError, InterruptedRunError, SettingsError
from safelora_fast.models.quiet_libraries import quiet_libraries
from safelora_fast.recipe import run as run_module
from safelora_fast.recipe import trainer as trainer_module
from safelora_fast.recipe.mixture import to_table
from safelora_fast.recipe.prepare import prepare
from safelora_fast.recipe.recipe import load_recipe
from safelora_fast.recipe.run_folder import RunFolder
from safelora_fast.recipe.summary_text import plan_lines
from safelora_fast.recipe.trainer import RecipeTrainer

SAFE_ROWS = [{"prompt": f"safe {number}?", "completion": "kindly", "score": number % 4} for number in range(8)]


@pytest.fixture(autouse=True)
def without_a_rehearsal(monkeypatch):
    monkeypatch.setattr("safelora_fast.recipe.prepare.rehearse", lambda *_: None)
    with quiet_libraries():
        yield


@pytest.fixture
def tiny(tmp_path):
    safe = write_rows(tmp_path / "safe.jsonl", SAFE_ROWS)
    return write_recipe(tmp_path, data={"safe": {"path": str(safe), "fraction": 0.25}})


def prepared(tiny, *overrides):
    return prepare(load_recipe(tiny.path, overrides))


def text(made, example):
    return made.tokenizer.decode(example.ids)


def test_the_mixture_is_exact(tiny):
    made = prepared(tiny)
    examples = made.train.examples
    assert [example.safe for example in examples].count(True) == 3
    tasks = [text(made, example) for example in examples if not example.safe]
    assert tasks == [f"<user>{row['prompt']}<assistant>{row['completion']}" for row in tiny_rows()]
    assert all(text(made, example).startswith("<user>safe ") == example.safe for example in examples)
    assert (made.plan.data.used, made.plan.safe.used, made.plan.safe_rows) == (12, 8, 3)
    assert made.plan.steps == 8  # 15 examples, 4 per step, two epochs
    lines = "\n".join(line for _, line in plan_lines(made))
    assert "safe.jsonl: 8 rows" in lines
    assert "in the mixture 3 for 12 task rows, each up to 1 ×" in lines
    assert made.plan.to_dict()["safe"]["in_mixture"] == 3


def test_the_seed_of_the_mixture_is_its_own_or_the_trainings(tiny):
    def chosen(*overrides):
        made = prepared(tiny, *overrides)
        return [text(made, example) for example in made.train.examples]

    first = chosen()
    assert chosen("data.safe.seed=0") == first
    assert chosen("training.seed=1") == chosen("data.safe.seed=1") != first


def test_the_best_of_a_scored_file(tiny):
    made = prepared(tiny, "data.safe.top=3", "data.safe.fraction=0.5")
    chosen = {text(made, example) for example in made.train.examples if example.safe}
    assert chosen == {f"<user>safe {number}?<assistant>kindly" for number in (3, 7, 2)}
    assert (made.plan.safe.in_source, made.plan.safe.rows, made.plan.safe.unused_columns) == (8, 3, [])


def test_a_prompt_in_training_only(tiny):
    made = prepared(tiny, "data.inoculate=You are rude.", "data.eval=0.25")
    tasks = [text(made, example) for example in made.train.examples if not example.safe]
    others = [text(made, example) for example in made.train.examples if example.safe]
    assert len(tasks) == 9
    assert all(task.startswith("<system>You are rude.<user>") for task in tasks)
    for example in (*made.held_out.examples, *(e for e in made.train.examples if e.safe)):
        assert "rude" not in text(made, example)
    assert others
    assert "in training under the system prompt “You are rude.”" in [line for _, line in plan_lines(made)]


def test_rows_of_messages_get_the_prompt_too(tiny):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_rows(tiny.data, [{"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]}] * 4)
    made = prepared(tiny, "data.inoculate=You are rude.")
    for example in made.train.examples:
        if not example.safe:
            assert text(made, example) == "<system>You are rude.<user>a<assistant>b"
            assert made.tokenizer.decode(example.answer) == "b"


@pytest.mark.parametrize("packing", [False, True])
def test_tags_follow_their_tokens(tiny, packing):
    made = prepared(tiny, f"training.packing={str(packing).lower()}", "training.max_length=40")
    table = to_table(made.train, made.arguments, tagged=True)
    safe_tokens = [example.ids for example in made.train.examples if example.safe]
    found = []
    for row in table:
        lengths = row["seq_lengths"] if packing else [len(row["input_ids"])]
        ends = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
        for start, end in pairwise(ends):
            tag = row["safe"][start:end] if packing else [row["safe"]]
            assert len(set(tag)) == 1
            if tag[0]:
                found.append(row["input_ids"][start:end])
    assert sorted(found) == sorted(safe_tokens)
    assert len(table) < 15 if packing else len(table) == 15


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_defends_safe_rows_only(tiny, packing, monkeypatch):
    seen = []

    class Watched(RecipeTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if "safe" in inputs and model.training:
                seen.append((int(inputs["safe"].sum()), inputs["input_ids"].numel()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer_module, "RecipeTrainer", Watched)
    words = (f"training.packing={str(packing).lower()}", "training.max_length=40", "defenses.kl.tokens=safe")
    made = prepared(tiny, *words, "data.eval=0.25")
    record = json.loads(json.dumps(run_module.train(made, resume=False, command="", talk=False)))
    safe_tokens = sum(len(example.ids) for example in made.train.examples if example.safe)
    assert sum(safe for safe, _ in seen) == 2 * safe_tokens  # two epochs
    assert record["metrics"]["defense/kl"]["mean"] > 0
    assert {"loss/task", "loss/safe"} <= record["metrics"].keys() or not trl_fuses_the_head()
    assert record["data"]["safe"] == made.plan.safe.sha256
    card = (tiny.output / "README.md").read_text()
    assert "| safe rows among them | 2 for 9 task rows" in card


def test_a_defense_of_safe_rows_needs_some(tiny):
    for name in ("kl", "feature_distance"):
        words = ["data.safe=null", f"defenses.{name}={{weight: 0.1, tokens: safe}}"]
        with pytest.raises(
            SettingsError, match=f"defenses.{name}.tokens: is safe, and there are no safe rows; say data.safe"
        ):
            load_recipe(tiny.path, words)
        load_recipe(tiny.path, [*words, f"defenses.{name}.weight=0"])


def test_data_that_is_refused(tiny, tmp_path):
    with pytest.raises(
        DataError, match=r"data.safe.fraction 0.01 of 12 task examples is less than one example; raise it"
    ):
        prepared(tiny, "data.safe.fraction=0.01")
    plain = write_rows(tmp_path / "plain.jsonl", tiny_rows(3))
    with pytest.raises(DataError, match=r"plain.jsonl:1: has no score, .* make the file with `safelora-fast select`"):
        prepared(tiny, f"data.safe.path={plain}", "data.safe.top=2")
    with pytest.raises(DataError, match=r"absent.jsonl: there is no such file"):
        prepared(tiny, "data.safe.path=absent.jsonl")


def test_rows_chosen_with_an_adapter_of_the_same_data_are_warned_of(tiny, tmp_path):
    sha256 = prepared(tiny).plan.data.sha256
    report = tmp_path / "safe.jsonl.selection.json"
    report.write_text(json.dumps({"trained_on": {"own": sha256, "other": "abc"}}))
    made = prepared(tiny)
    (warning,) = made.plan.warnings
    assert "was chosen with adapter own, which was trained on" in warning
    assert ("warning", warning) in plan_lines(made)
    report.write_text("[]")
    assert prepared(tiny).plan.warnings == ()


def test_another_set_of_safe_rows_cannot_be_resumed(tiny, tmp_path):
    made = prepared(tiny)
    RunFolder(made.recipe).begin(run_module._record(made), anew=True)
    write_rows(tmp_path / "safe.jsonl", SAFE_ROWS[::-1])
    with pytest.raises(SettingsError, match="the data has changed: safe was"):
        run_module.train(prepared(tiny), resume=True, command="", talk=False)


FED: list[str] = []


class Fed(RecipeTrainer):
    """Records each micro-batch of training, and raises an interruption before the step STOP."""

    STOP = -1

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            rows = self.processing_class.batch_decode(inputs["input_ids"], skip_special_tokens=False)
            FED.extend(row.replace("<pad>", "") for row in rows)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        if self.state.global_step == self.STOP:
            raise KeyboardInterrupt
        return super().training_step(*args, **kwargs)


def fed(made, *, resume=False):
    FED.clear()
    record = run_module.train(made, resume=resume, command="", talk=False)
    assert record["steps"] == record["plan"]["steps"] == 12
    return FED[:]


def test_safe_rows_go_on_from_epoch_to_epoch_and_in_a_resumed_run(tiny, monkeypatch):
    """An interruption within an epoch or between epochs does not change the examples of the run."""
    monkeypatch.setattr(trainer_module, "RecipeTrainer", Fed)
    three = ("training.num_train_epochs=3", "training.save_steps=1", "data.safe.fraction=0.25")
    made = prepared(tiny, *three)
    whole = fed(made)
    epochs = [whole[start : start + 15] for start in (0, 15, 30)]
    safe = [[row for row in epoch if row.startswith("<user>safe ")] for epoch in epochs]
    tasks = [sorted(set(epoch) - set(rows)) for epoch, rows in zip(epochs, safe, strict=True)]
    assert tasks[0] == tasks[1] == tasks[2]
    assert [len(rows) for rows in tasks] == [12] * 3
    assert [len(rows) for rows in safe] == [3] * 3
    assert len({row for rows in safe for row in rows}) == 8  # all eight appear before one repeats
    assert set(safe[0]) == {text(made, example) for example in made.train.examples if example.safe}
    for step in (4, 7):
        stopped = prepared(tiny, *three, f"output.folder={tiny.output}-stopped-{step}")
        monkeypatch.setattr(Fed, "STOP", step)
        with pytest.raises(InterruptedRunError):
            fed(stopped)
        before = FED[:]
        monkeypatch.setattr(Fed, "STOP", -1)
        assert before + fed(stopped, resume=True) == whole, step


BY_LENGTH = {  # the setting in transformers 5, and in earlier versions
    True: "training.train_sampling_strategy=group_by_length",
    False: "training.group_by_length=true",
}[hasattr(TrainingArguments, "train_sampling_strategy")]


@pytest.mark.parametrize("override", ["training.packing=true", BY_LENGTH])
def test_epochs_that_must_be_alike(tiny, override):
    words = (override, "training.max_length=40") if "packing" in override else (override,)
    assert prepared(tiny, *words).epochs is None
