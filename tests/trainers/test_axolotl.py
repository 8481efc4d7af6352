"""axolotl's own training on the CPU with the plugin: the log, shared logits, resuming, the projection, and refusals."""

from __future__ import annotations

import os

import pytest
from other_trainers import KL, losses, pair_of, shared_losses, write_inputs, write_settings
from safetensors.torch import load_file
from tiny_models import adapter_weights, furthest

from safelora_fast.errors import SettingsError

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
pytest.importorskip(
    "axolotl", reason="axolotl is not installed: `make test-matrix` runs this in an environment of its own"
)
pytestmark = pytest.mark.slow  # to import

PLUGIN = "safelora_fast.trainers.axolotl.SafeLoraFastPlugin"
TRAINER = "safelora_fast.trainers.axolotl.DefendedAxolotlTrainer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("axolotl"))


def settings(folder, name, **changes):
    return {
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "data.jsonl"), "type": "chat_template", "ds_type": "json"}],
        "chat_template": "tokenizer_default",
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "output_dir": str(folder / name),
        "sequence_len": 64,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 2,
        "bf16": False,
        "tf32": False,
        "seed": 7,
        "include_tkps": True,
        "plugins": [PLUGIN],
        **changes,
    }


def load(folder, name, **changes):
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().plugins.pop(PLUGIN, None)  # of the run before
    return load_cfg(str(write_settings(folder / f"{name}.yaml", settings(folder, name, **changes))))


def train(folder, name, **changes):
    """Train as `axolotl train` does; return the trainer and the adapter's weights."""
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train as train_by

    cfg = load(folder, name, **changes)
    model, _, trainer = train_by(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    return trainer, adapter_weights(model)


@pytest.fixture(scope="module")
def defended(folder):
    return train(folder, "defended", safelora_fast=KL)


def test_the_log_has_the_metrics_and_the_weights_differ(folder, defended):
    plain, weights = train(folder, "plain")
    assert not hasattr(plain, "use_defenses")
    logs = losses(defended[0])
    assert [entry["step"] for entry in logs] == [1, 2, 3, 4]
    assert logs[0]["defense/kl"] == pytest.approx(0, abs=1e-6)
    assert logs[-1]["defense/kl"] > 1e-5  # so the reference runs without the adapter, axolotl's LoRA kernels included
    assert logs[-1]["tokens/trainable"] == losses(plain)[-1]["tokens/trainable"]
    assert furthest(weights, defended[1]) > 1e-3


@pytest.mark.parametrize("chosen_by", ["plugin", "trainer_cls"])
def test_shared_logits_give_the_same_training(folder, defended, chosen_by, monkeypatch):
    """Once with the trainer's own loss apart, once with logits shared and without the plugin."""
    from safelora_fast.trainers.axolotl import DefendedAxolotlTrainer

    changes = {"plugins": [], "trainer_cls": TRAINER}
    if chosen_by == "plugin":
        monkeypatch.setattr(DefendedAxolotlTrainer, "why_apart", lambda *_: "the test says so")
        changes = {}
    shared = shared_losses(monkeypatch)
    trainer, weights = train(folder, chosen_by, safelora_fast=KL, **changes)
    assert len(shared) == (0 if chosen_by == "plugin" else 8)
    assert furthest(weights, defended[1]) < 1e-5
    for ours, theirs in zip(losses(trainer), losses(defended[0]), strict=True):
        for key in ("loss", "defense/kl", "grad_norm", "tokens/trainable"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-7), key


@pytest.mark.usefixtures("defended")
def test_a_resumed_run_ends_like_a_whole_one_and_is_projected(folder):
    """The checkpoints hold the adapter as it was trained, the final one is projected."""
    checkpoint = str(folder / "defended" / "checkpoint-2")
    both = {"defenses": {**KL["defenses"], **pair_of(folder)}}
    trainer, weights = train(folder, "resumed", safelora_fast=both, resume_from_checkpoint=checkpoint)
    file = "adapter_model.safetensors"
    before = load_file(folder / "resumed" / "checkpoint-4" / file)
    assert furthest(before, load_file(folder / "defended" / "checkpoint-4" / file)) < 1e-6
    saved = load_file(folder / "resumed" / file)
    assert len(trainer.projection_report.adapters[0].modules) == 8
    for name, value in saved.items():
        assert (value - before[name]).norm() > 1e-3 * before[name].norm() or "lora_A" in name
        assert value.equal(weights[name.replace(".weight", ".default.weight")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"safelora_fast": {"defenses": {"kl": {"wieght": 1}}}},
            r"\.yaml:\d+: defenses.kl.wieght: .*did you mean weight",
        ),
        ({"safelora_fast": {"kl": {"weight": 1}}}, r"kl: unknown"),
        ({"safelora_fast": {"defenses": {"kl": False}}}, "no defense and no monitor"),
        ({"safelora_fast": KL, "rl": "dpo"}, "rl is set"),
        ({"safelora_fast": KL, "context_parallel_size": 2}, "context_parallel_size > 1"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(folder, changes, message):
    with pytest.raises(SettingsError, match=message):
        load(folder, "wrong", **changes)


def test_a_trainer_without_defenses_is_refused(folder):
    theirs = "axolotl.core.trainers.base.AxolotlTrainer"
    with pytest.raises(SettingsError, match="AxolotlTrainer is trained with, which has no defenses"):
        train(folder, "theirs", safelora_fast=KL, trainer_cls=theirs)
    with pytest.raises(SettingsError, match="safelora_fast: missing"):
        train(folder, "none", plugins=[], trainer_cls=TRAINER)
