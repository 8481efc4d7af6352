"""`train`: the plan, the run, its output, and the run again."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from demo_model import save_tiny
from peft import PeftModel
from tiny_recipe import difference, tiny_rows, write_recipe, write_rows
from transformers import AutoModelForCausalLM

from safelora_fast.files.output import alone
from safelora_fast.recipe import run as run_module
from safelora_fast.recipe.prepare import prepare
from safelora_fast.recipe.recipe import load_recipe
from safelora_fast.recipe.trainer import RecipeTrainer


@pytest.fixture
def tiny(tmp_path):
    return write_recipe(tmp_path)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny, call):
    (tiny.model / "model.safetensors").unlink()
    result = call(*tiny.words("--dry-run"))
    assert (result.code, result.err) == (0, "")
    for words in (
        "LlamaForCausalLM",
        "12 rows",
        "6 steps of 4 rows",
        "kl: weight 0.5",
        "reference pass",
        "nothing was written",
    ):
        assert words in result.out
    assert not tiny.output.exists()
    plan = json.loads(call(*tiny.words("--dry-run", "--json", "training.max_steps=3")).out)
    assert (plan["steps"], plan["data"]["used"], plan["model"]["adapted_modules"]) == (3, 12, 14)
    assert plan["estimates"]["relative_step"] > 1


def test_output(tiny, call):
    result = call(*tiny.words("data.eval=0.25"))
    assert result.code == 0, result.err
    assert f"written to {tiny.output}" in result.out
    names = sorted(path.name for path in tiny.output.iterdir())
    assert names == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
        "safelora_train.json",
    ]
    record = tiny.record()
    assert (record["finished"], record["steps"], record["plan"]["steps"]) == (True, 6, 6)
    assert record["recipe"]["training"]["seed"] == 0
    assert record["trainer_arguments"]["per_device_train_batch_size"] == 2
    assert {"torch", "trl", "peft", "transformers", "safelora-fast"} <= record["versions"].keys()
    assert record["metrics"]["loss"]["last"] < record["metrics"]["loss"]["first"]
    assert record["metrics"]["defense/kl"]["last"] > 0
    assert record["metrics"]["eval_loss"]["last"] < record["metrics"]["eval_loss"]["first"]
    assert record["seconds"] > 0
    card = (tiny.output / "README.md").read_text()
    for words in (
        f"`{tiny.model.name}`",
        f"`{tiny.data.name}`",
        record["plan"]["data"]["sha256"],
        "weight 0.5",
        "| r | 4 |",
        "KL(fine-tuned",
    ):
        assert words in card
    assert str(tiny.output.parent) not in card
    assert "base_model" not in card.partition("\n---\n")[0]  # the Hub refuses a path there
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32), tiny.output
    )
    trained = {name for name, parameter in model.named_parameters() if "lora_B" in name and parameter.any()}
    assert len(trained) == 14


def test_the_card_says_when_there_is_no_defense(tiny, call):
    tiny.edit(defenses={"kl": {"weight": 0}})
    assert call(*tiny.words("-q", "training.max_steps=1")).out == ""
    assert "without any defense" in (tiny.output / "README.md").read_text()
    assert call(*tiny.words("-q", "training.max_steps=1", "defenses.kl=false", "--overwrite")).code == 0
    card = (tiny.output / "README.md").read_text()
    assert "without any defense" in card
    assert "\nNone.\n" in card


SHORT = ("-q", "training.max_steps=2", "training.save_strategy=no")


def test_a_switched_off_defense_changes_nothing(tiny, call, tmp_path):
    """And both equal the plain trainer, which knows nothing of defences."""
    call(*tiny.words(*SHORT, "defenses.kl=false"))
    plain = tiny.weights()
    call(*tiny.words(*SHORT, "defenses.kl.weight=0", f"output.folder={tmp_path / 'off'}"))
    assert difference(plain, tiny.weights(tmp_path / "off")) == 0
    call(*tiny.words(*SHORT, f"output.folder={tmp_path / 'on'}"))
    assert difference(plain, tiny.weights(tmp_path / "on")) > 1e-4


def test_the_same_recipe_gives_the_same_bytes(tiny, call, tmp_path):
    call(*tiny.words(*SHORT))
    names = ("adapter_model.safetensors", "adapter_config.json", "README.md")
    before = {name: (tiny.output / name).read_bytes() for name in names}
    assert call(*tiny.words(*SHORT, "--overwrite")).code == 0
    assert {name: (tiny.output / name).read_bytes() for name in names} == before
    call(*tiny.words(*SHORT, "training.seed=1", f"output.folder={tmp_path / 'other'}"))
    assert difference(tiny.weights(), tiny.weights(tmp_path / "other")) > 1e-4


class Stop(RecipeTrainer):
    """Is interrupted in its fifth step; the checkpoints of steps 2 and 4 are whole."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return super().training_step(*args, **kwargs)


@pytest.fixture
def interrupted(monkeypatch, call):
    def run(tiny, *words):
        with monkeypatch.context() as patch:
            patch.setattr("safelora_fast.recipe.trainer.RecipeTrainer", Stop)
            return call(*tiny.words("-q", *words))

    return run


DEFENCES = {
    "kl": {"weight": 0.5},
    "feature_distance": {"layers": 2},
    "steering": {"vector": [0.1] * 32, "layer": 0, "coefficient": 2.0},
}


def test_resume_gives_what_an_unbroken_run_gives(tiny, call, interrupted, tmp_path):
    tiny.edit(lora={"lora_dropout": 0.2}, defenses=DEFENCES, data={"eval": 0.2})
    unbroken = tmp_path / "unbroken"
    assert call(*tiny.words("-q", f"output.folder={unbroken}")).code == 0
    stopped = interrupted(tiny)
    assert stopped.code == 130
    assert "interrupted after step 4; the checkpoint of step 4 is whole; to go on: safelora-fast train" in stopped.err
    assert stopped.err.strip().endswith("--resume")
    assert not (tiny.output / "adapter_model.safetensors").exists()
    assert tiny.record()["finished"] is False
    (tiny.output / "checkpoints" / "checkpoint-4" / "safelora_checkpoint.json").unlink()
    resumed = call(*tiny.words("--resume"))
    assert resumed.code == 0, resumed.err
    assert difference(tiny.weights(), tiny.weights(unbroken)) == 0
    ours, theirs = (json.loads((folder / "safelora_train.json").read_text()) for folder in (tiny.output, unbroken))
    for name in ("loss", "defense/kl", "defense/feature_distance"):
        assert ours["metrics"][name] == theirs["metrics"][name]
    assert ours["steps"] == theirs["steps"] == 6
    assert (tiny.output / "README.md").read_text().count("steering") >= 1


def test_resume_refuses_what_has_changed(tiny, call, interrupted):
    interrupted(tiny)
    result = call(*tiny.words("--resume", "defenses.kl.weight=0.9", "training.learning_rate=0.02"))
    assert result.code == 2
    assert "defenses.kl.weight was 0.5, is 0.9" in result.err
    assert "training.learning_rate was 0.01, is 0.02" in result.err
    write_rows(tiny.data, tiny_rows()[::-1])
    result = call(*tiny.words("--resume"))
    assert result.code == 2
    assert "the data has changed: train was" in result.err
    assert len(result.err.splitlines()) == 1


def test_resume_refuses_other_bytes_under_the_same_names(tiny, call, interrupted):
    """Half of a run on one model and half on another is a run on neither."""
    interrupted(tiny)
    file = tiny.model / "generation_config.json"
    before = file.read_text()
    file.write_text(before + " ")
    try:
        result = call(*tiny.words("--resume"))
    finally:
        file.write_text(before)
    assert result.code == 2
    assert "the input has changed: model.model_sha256 was" in result.err
    assert len(result.err.splitlines()) == 1
    assert call(*tiny.words("--resume")).code == 0


@pytest.mark.parametrize("projected", [False, True])
def test_resume_from_the_last_step_within_an_epoch(tiny, call, monkeypatch, tmp_path, projected):
    """All steps are made and only the output is missing: nothing more may be trained, and the end is not forgotten."""
    words = ("-q", "training.max_steps=2")
    if projected:
        pair = {"aligned": str(tiny.model), "base": str(save_tiny(tmp_path / "base", seed=1))}
        tiny.edit(defenses={"safelora": {"subspace": pair, "select": "all"}})
    call(*tiny.words(*words, f"output.folder={tmp_path / 'unbroken'}"))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_write", stop)
        assert call(*tiny.words(*words)).code == 130
    assert tiny.checkpoints() == [2]
    assert call(*tiny.words(*words, "--resume")).code == 0
    record = tiny.record()
    assert record["steps"] == 2
    if projected:
        assert record["projection"]["adapters"][0]["counts"]["projected"] == 14
        assert record["metrics"]["defense/modules_projected"]["last"] == 14
        assert "At the end 14 of 14 adapted modules were projected" in (tiny.output / "README.md").read_text()
        call(*tiny.words(*words, "defenses.safelora=false", f"output.folder={tmp_path / 'whole'}"))
        assert difference(tiny.weights(), tiny.weights(tmp_path / "whole")) > 1e-3
    assert difference(tiny.weights(), tiny.weights(tmp_path / "unbroken")) == 0


def test_resume_without_a_checkpoint_begins_anew(tiny, call):
    assert call(*tiny.words("--resume", "training.save_strategy=no", "training.max_steps=1")).code == 0
    again = call(*tiny.words("--resume", "training.save_strategy=no", "training.max_steps=1"))
    assert (again.code, again.err) == (0, "")
    assert "1 steps in" in again.out
    assert "model" not in again.out


def test_an_output_that_exists(tiny, call):
    call(*tiny.words("-q", "training.max_steps=1"))
    before = tiny.weights()
    refused = call(*tiny.words())
    assert refused.code == 2
    assert "holds a run already; pass --resume to go on with it, --overwrite to start anew" in refused.err
    assert difference(before, tiny.weights()) == 0
    assert call(*tiny.words("-q", "training.max_steps=2", "--overwrite")).code == 0
    assert tiny.record()["steps"] == 2
    assert tiny.checkpoints() == [2]


def test_a_failed_start_leaves_an_earlier_run(tiny, call):
    call(*tiny.words("-q", "training.max_steps=1"))
    before = tiny.weights()
    (tiny.model / "model.safetensors").write_bytes(b"broken")
    assert call(*tiny.words("--overwrite")).code == 2
    assert difference(before, tiny.weights()) == 0


def test_a_changed_tokenizer_goes_with_the_adapter(tiny, call, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert call(*tiny.words("-q", "training.max_steps=1", f"model.chat_template={template}")).code == 0
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tiny.output).chat_template == template.read_text()


def test_packed_rows(tiny, call):
    words = ("training.packing=true", "training.max_length=40", "training.gradient_accumulation_steps=1")
    result = call(*tiny.words(*words))
    assert result.code == 0, result.err
    assert "packed rows" in result.out
    assert tiny.record()["metrics"]["defense/kl"]["last"] > 0


def test_only_answers_of_packed_rows_are_learnt(tiny, call, monkeypatch):
    seen = []

    def compute_loss(trainer, model, inputs, *args, **kwargs):
        seen.extend(inputs["labels"].flatten().tolist())
        return super(RecipeTrainer, trainer).compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(RecipeTrainer, "compute_loss", compute_loss, raising=False)
    words = ("training.packing=true", "training.max_length=40", "training.num_train_epochs=1")
    assert call(*tiny.words("-q", *words)).code == 0
    examples = prepare(load_recipe(tiny.path, [])).train.examples
    assert sorted(label for label in seen if label != -100) == sorted(
        label for example in examples for label in example.answer
    )


def test_a_folder_that_another_run_writes_to(tiny, call):
    with alone(tiny.output):
        result = call(*tiny.words("-q"))
    assert result.code == 2
    assert f"{tiny.output}: another run (process {os.getpid()}) is writing there" in result.err
    assert not tiny.output.exists()
    assert call(*tiny.words("-q")).code == 0
    assert not list(tiny.output.parent.glob("*.lock"))


def test_missing_weights_are_refused(tiny, call):
    from safetensors.torch import load_file, save_file

    file = tiny.model / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    result = call(*tiny.words("-q"))
    assert result.code == 2
    assert "the checkpoint lacks 1 weights, e.g. model.layers.1.mlp.up_proj.weight" in result.err


def test_an_adapter_that_is_not_finite_is_not_written(tiny, call):
    result = call(*tiny.words("-q", "training.learning_rate=1e30", "defenses.kl=false", "training.max_grad_norm=0.0"))
    assert result.code == 2
    assert "the trained adapter holds NaN or Inf" in result.err
    assert not (tiny.output / "adapter_model.safetensors").exists()


def test_a_defence_that_is_not_finite_stops_the_run(tiny, call):
    result = call(*tiny.words("-q", "training.learning_rate=1e30", "training.max_grad_norm=0.0"))
    assert result.code == 2
    assert result.err.startswith("error: defense kl is not finite at optimizer step")
    assert len(result.err.splitlines()) == 1


def test_a_subspace_of_another_model(tiny, call, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1)
    source = f"{{aligned: {tiny.model}, base: {other}, rank: 2}}"
    words = ("-q", "training.max_steps=2", f"defenses={{subspace_penalty: {{subspace: {source}}}}}")
    result = call(*tiny.words(*words))
    assert result.code == 0, result.err
    assert tiny.record()["metrics"]["defense/subspace_penalty"]["last"] > 0


class Signalled(RecipeTrainer):
    """Gets a signal in its fourth step, in the first micro-batch; and another in the second if `TWICE`."""

    TWICE = False
    sent = 0

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3 and self.sent < 1 + self.TWICE:
            self.sent += 1
            os.kill(os.getpid(), signal.SIGINT)
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize(("twice", "step", "kept"), [(False, 4, 4), (True, 3, 2)])
def test_a_signal_lets_the_step_be_finished(tiny, call, monkeypatch, twice, step, kept):
    monkeypatch.setattr(Signalled, "TWICE", twice)
    monkeypatch.setattr("safelora_fast.recipe.trainer.RecipeTrainer", Signalled)
    before = signal.getsignal(signal.SIGINT)
    result = call(*tiny.words("-q"))
    assert result.code == 130
    assert signal.getsignal(signal.SIGINT) is before
    told, last = result.err.splitlines()
    assert told.startswith("stopping after this step")
    assert last.startswith(
        f"interrupted after step {step}; the checkpoint of step {kept} is whole; to go on: safelora-fast"
    )


def test_a_signal_where_no_checkpoints_are_made(tiny, call, monkeypatch):
    monkeypatch.setattr("safelora_fast.recipe.trainer.RecipeTrainer", Signalled)
    result = call(*tiny.words("-q", "training.save_strategy=no"))
    assert result.code == 130
    assert "interrupted after step 4; no checkpoint was whole yet; to go on:" in result.err
    assert tiny.checkpoints() == []
