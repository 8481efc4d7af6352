"""`train`: the plan, the run, its output, and a run that resumes."""

from __future__ import annotations

import json
import os
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from demo_model import save_tiny
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_recipe import difference, tiny_rows, write_recipe, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from safelora_fast.files.output import alone
from safelora_fast.models.reference_pass import ReferencePass
from safelora_fast.recipe import run as run_module
from safelora_fast.recipe.prepare import prepare
from safelora_fast.recipe.recipe import load_recipe
from safelora_fast.recipe.trainer import RecipeTrainer

SHORT = ("-q", "training.max_steps=2", "training.save_strategy=no")
ONE_STEP = ("-q", "training.max_steps=1")
TRAINER = "safelora_fast.recipe.trainer.RecipeTrainer"


@pytest.fixture
def tiny(tmp_path):
    return write_recipe(tmp_path)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny, call):
    (tiny.model / "model.safetensors").unlink()
    result = call(*tiny.words("--dry-run"))
    assert (result.code, result.err) == (0, "")
    for words in ("LlamaForCausalLM", "12 rows", "6 steps of 4 rows", "kl: weight 0.5", "nothing was written"):
        assert words in result.out
    assert not tiny.output.exists()
    plan = json.loads(call(*tiny.words("--dry-run", "--json", "training.max_steps=3")).out)
    assert (plan["steps"], plan["data"]["used"], plan["model"]["adapted_modules"]) == (3, 12, 14)
    assert plan["estimates"]["relative_step"] > 1


def test_output(tiny, call):
    result = call(*tiny.words("data.eval=0.25"))
    assert result.code == 0, result.err
    assert f"written to {tiny.output}" in result.out
    assert {path.name for path in tiny.output.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoints", "safelora_train.json",
    }  # fmt: skip
    assert not list(tiny.output.parent.glob("*.lock"))
    record = tiny.record()
    assert (record["finished"], record["steps"], record["plan"]["steps"]) == (True, 6, 6)
    assert record["recipe"]["training"]["seed"] == 0
    assert record["trainer_arguments"]["per_device_train_batch_size"] == 2
    assert {"torch", "trl", "peft", "transformers", "safelora-fast"} <= record["versions"].keys()
    for name in ("loss", "eval_loss"):
        assert record["metrics"][name]["last"] < record["metrics"][name]["first"]
    assert record["metrics"]["defense/kl"]["last"] > 0
    assert record["seconds"] > 0
    card = (tiny.output / "README.md").read_text()
    sha256 = record["plan"]["data"]["sha256"]
    for words in (f"`{tiny.model.name}`", f"`{tiny.data.name}`", sha256, "weight 0.5", "| r | 4 |", "KL(fine-tuned"):
        assert words in card
    assert str(tiny.output.parent) not in card
    assert "base_model" not in card.partition("\n---\n")[0]  # the Hub rejects a path there
    base = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tiny.output)
    assert sum("lora_B" in name and bool(parameter.any()) for name, parameter in model.named_parameters()) == 14


def test_the_same_recipe_gives_the_same_bytes_and_a_defense_of_weight_zero_changes_nothing(tiny, call, tmp_path):
    call(*tiny.words(*SHORT))
    names = ("adapter_model.safetensors", "adapter_config.json", "README.md")
    before = {name: (tiny.output / name).read_bytes() for name in names}
    assert call(*tiny.words(*SHORT, "--overwrite")).code == 0
    assert {name: (tiny.output / name).read_bytes() for name in names} == before
    others = {"seed": "training.seed=1", "plain": "defenses.kl=false", "off": "defenses.kl.weight=0"}
    for name, word in others.items():
        assert call(*tiny.words(*SHORT, word, f"output.folder={tmp_path / name}")).out == ""
    plain = tiny.weights(tmp_path / "plain")  # trained without a defense
    assert difference(plain, tiny.weights(tmp_path / "off")) == 0
    for other in (plain, tiny.weights(tmp_path / "seed")):
        assert difference(tiny.weights(), other) > 1e-4
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("plain", "off")}
    assert all("without any defense" in card for card in cards.values())
    assert "\nNone.\n" in cards["plain"]


class Stop(RecipeTrainer):
    """Raises KeyboardInterrupt in step 5; the checkpoints of steps 2 and 4 are complete."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return super().training_step(*args, **kwargs)


@pytest.fixture
def interrupted(monkeypatch, call):
    def run(tiny, *words):
        with monkeypatch.context() as patch:
            patch.setattr(TRAINER, Stop)
            return call(*tiny.words("-q", *words))

    return run


def test_the_second_epoch_and_another_seed_read_the_reference_from_disk(tiny, call, monkeypatch, tmp_path):
    passes, run = [], ReferencePass.run
    monkeypatch.setattr(ReferencePass, "run", lambda *args, **kwargs: passes.append(1) or run(*args, **kwargs))
    cache = tmp_path / "cache"
    given = (f"defenses.reference=cache:{cache}", "defenses.feature_distance={weight: 0.5, layers: 2}")
    result = call(*tiny.words("--dry-run", *given))
    assert f"kept in {cache} (up to ≈ " in result.out
    assert not cache.exists()
    planned = json.loads(call(*tiny.words("--dry-run", "--json", *given)).out)
    nbytes = planned["estimates"]["cache_bytes"]
    assert nbytes % (3 * 4 * planned["data"]["tokens"]) == 0
    first = call(*tiny.words(*given, "-q"))
    assert first.code == 0, first.err
    assert len(passes) == 6  # micro-batches of one of the two epochs
    (file,) = cache.glob("*/*.records")
    assert nbytes < file.stat().st_size < nbytes + 12 * 200
    packed = (*given, "training.packing=true", "training.max_length=16", "training.packing_strategy=bfd")
    plan = call(*tiny.words("--dry-run", *packed)).out
    assert "every epoch packs or flattens other rows, so it grows and saves no pass" in plan
    again = json.loads(call(*tiny.words("--dry-run", "--json", *packed)).out)["estimates"]["cache_bytes"]
    assert 1.9 * nbytes < again < 2.3 * nbytes  # two epochs
    alone = call(*tiny.words("--dry-run", *packed, "training.per_device_train_batch_size=1")).out
    assert "later epochs, and runs on the same rows, read it there" in alone
    assert tiny.record()["recipe"]["defenses"]["reference"] == f"cache:{cache}"
    passes.clear()
    assert call(*tiny.words(*given, "-q", "--overwrite", "training.seed=1")).code == 0
    assert len(passes) == 1  # one row, to compare it
    found = tiny.weights()
    assert call(*tiny.words(given[1], "-q", "--overwrite", "training.seed=1")).code == 0
    assert difference(found, tiny.weights()) < 1e-5


def test_resume_gives_what_an_unbroken_run_gives(tiny, call, interrupted, tmp_path):
    defenses = {
        "kl": {"weight": 0.5},
        "feature_distance": {"layers": 2},
        "steering": {"vector": [0.1] * 32, "layer": 0, "coefficient": 2.0},
    }
    tiny.edit(lora={"lora_dropout": 0.2}, defenses=defenses, data={"eval": 0.2})
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


def test_resume_refuses_what_has_changed(tiny, call, interrupted):
    """A run must not continue on another model."""
    interrupted(tiny)
    words = call(*tiny.words("--resume", "defenses.kl.weight=0.9")).err
    assert "because the recipe has changed: defenses.kl.weight was 0.5, is 0.9" in words
    changes = {
        "the data has changed: train was": lambda: write_rows(tiny.data, tiny_rows()[::-1]),
        "the input has changed: model.model_sha256 was": lambda: settings.write_text(settings.read_text() + " "),
    }
    settings = tiny.model / "generation_config.json"
    for message, change in changes.items():
        before = {file: file.read_bytes() for file in (tiny.data, settings)}
        change()
        result = call(*tiny.words("--resume"))
        assert result.code == 2
        assert message in result.err
        assert result.err.count("\n") == 1
        for file, content in before.items():
            file.write_bytes(content)
    assert call(*tiny.words("--resume")).code == 0


def test_resume_from_the_last_step_within_an_epoch(tiny, call, monkeypatch, tmp_path):
    """All steps are done, and only the output is missing. No step is trained, and the adapter is still projected."""
    words = ("-q", "training.max_steps=2")
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
    assert record["projection"]["adapters"][0]["counts"]["projected"] == 14
    assert record["metrics"]["defense/modules_projected"]["last"] == 14
    assert "At the end 14 of 14 adapted modules were projected" in (tiny.output / "README.md").read_text()
    assert difference(tiny.weights(), tiny.weights(tmp_path / "unbroken")) == 0
    call(*tiny.words(*words, "defenses.safelora=false", f"output.folder={tmp_path / 'whole'}"))
    assert difference(tiny.weights(), tiny.weights(tmp_path / "whole")) > 1e-3


def test_resume_without_a_checkpoint_begins_anew(tiny, call):
    words = ("--resume", "training.save_strategy=no", "training.max_steps=1")
    assert call(*tiny.words(*words)).code == 0
    again = call(*tiny.words(*words))
    assert (again.code, again.err) == (0, "")
    assert "1 steps in" in again.out
    assert "model" not in again.out


def test_an_output_that_exists(tiny, call):
    call(*tiny.words(*ONE_STEP))
    before, file = tiny.weights(), tiny.model / "model.safetensors"
    refused = call(*tiny.words())
    assert refused.code == 2
    assert "holds a run already; pass --resume to go on with it, --overwrite to start anew" in refused.err
    content = file.read_bytes()
    file.write_bytes(b"broken")
    assert call(*tiny.words("--overwrite")).code == 2
    assert difference(before, tiny.weights()) == 0, "a run that could not start has removed an earlier one"
    file.write_bytes(content)
    assert call(*tiny.words("-q", "training.max_steps=2", "--overwrite")).code == 0
    assert (tiny.record()["steps"], tiny.checkpoints()) == (2, [2])


def test_a_changed_tokenizer_goes_with_the_adapter(tiny, call, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert call(*tiny.words(*ONE_STEP, f"model.chat_template={template}")).code == 0
    assert AutoTokenizer.from_pretrained(tiny.output).chat_template == template.read_text()


def test_only_completions_of_packed_rows_are_learned(tiny, call, monkeypatch):
    seen = []

    def compute_loss(trainer, model, inputs, *args, **kwargs):
        seen.extend(inputs["labels"].flatten().tolist())
        return super(RecipeTrainer, trainer).compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(RecipeTrainer, "compute_loss", compute_loss, raising=False)
    result = call(
        *tiny.words("training.packing=true", "training.max_length=40", "training.gradient_accumulation_steps=1")
    )
    assert result.code == 0, result.err
    assert "packed rows" in result.out
    assert tiny.record()["metrics"]["defense/kl"]["mean"] > 0
    answers = [label for example in prepare(load_recipe(tiny.path)).train.examples for label in example.answer]
    assert sorted(label for label in seen if label != -100) == sorted(2 * answers)  # two epochs


def test_a_folder_that_another_run_writes_to(tiny, call):
    with alone(tiny.output):
        result = call(*tiny.words("-q"))
    assert result.code == 2
    assert f"{tiny.output}: another run (process {os.getpid()}) is writing there" in result.err
    assert not tiny.output.exists()


def test_missing_weights_are_refused(tiny, call):
    file = tiny.model / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    result = call(*tiny.words("-q"))
    assert result.code == 2
    assert "the checkpoint lacks 1 weights, e.g. model.layers.1.mlp.up_proj.weight" in result.err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("defenses.kl=false", "the trained adapter holds NaN or Inf"),
        ("defenses.kl=true", "error: defense kl is not finite at optimizer step"),
    ],
)
def test_what_is_not_finite_stops_the_run(tiny, call, word, message):
    result = call(*tiny.words("-q", "training.learning_rate=1e30", "training.max_grad_norm=0.0", word))
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tiny.output / "adapter_model.safetensors").exists()


def test_a_subspace_of_another_model(tiny, call, tmp_path):
    source = f"{{aligned: {tiny.model}, base: {save_tiny(tmp_path / 'other', seed=1)}, rank: 2}}"
    result = call(*tiny.words(*SHORT, f"defenses={{subspace_penalty: {{subspace: {source}}}}}"))
    assert result.code == 0, result.err
    assert tiny.record()["metrics"]["defense/subspace_penalty"]["last"] > 0


class Signalled(RecipeTrainer):
    """Receives SIGNAL in step 4, in the first micro-batch, and again in the next one if TWICE."""

    SIGNAL, TWICE, sent = signal.SIGINT, False, 0

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3 and self.sent < 1 + self.TWICE:
            self.sent += 1
            os.kill(os.getpid(), self.SIGNAL)
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize(
    ("number", "twice", "word", "code", "kept"),
    [
        (signal.SIGINT, False, "training.save_steps=2", 130, "step 4; the checkpoint of step 4 is whole"),
        (signal.SIGINT, True, "training.save_steps=2", 130, "step 3; the checkpoint of step 2 is whole"),
        (signal.SIGINT, False, "training.save_strategy=no", 130, "step 4; no checkpoint was whole yet"),
        (signal.SIGTERM, False, "training.save_steps=2", 143, "step 4; the checkpoint of step 4 is whole"),
    ],
)
def test_a_signal_lets_the_step_be_finished(tiny, call, monkeypatch, number, twice, word, code, kept):
    monkeypatch.setattr(Signalled, "SIGNAL", number)
    monkeypatch.setattr(Signalled, "TWICE", twice)
    monkeypatch.setattr(TRAINER, Signalled)
    before = signal.getsignal(signal.SIGINT)
    result = call(*tiny.words("-q", word))
    assert result.code == code
    assert signal.getsignal(signal.SIGINT) is before
    *told, last = result.err.splitlines()
    assert last.startswith(f"interrupted after {kept}; to go on: safelora-fast")
    assert [line.partition(";")[0] for line in told] == ["stopping after this step"] * (number == signal.SIGINT)
    assert tiny.checkpoints() == ([] if "=no" in word else [2, 4][: 1 + (not twice)])


@contextmanager
def files_of_at_most(nbytes):
    """Limit the file size of this process, as on a full disk."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk(tiny, call):
    """There is room for the record, but not for the optimizer state."""
    with files_of_at_most(20_000):
        result = call(*tiny.words("-q"))
    assert (result.code, result.out) == (2, ""), result.err
    assert result.err.startswith(f"error: {tiny.output}: cannot be written")
    assert "make room and pass --resume" in result.err
    assert result.err.count("\n") == 1
    assert not (tiny.output / "adapter_model.safetensors").exists()
    assert call(*tiny.words("-q", "--resume")).code == 0
