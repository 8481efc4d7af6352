"""LLaMA-Factory's own training on the CPU with defenses: the log, shared logits, packing, resuming, and refusals."""

from __future__ import annotations

import json

import pytest
from other_trainers import KL, losses, shared_losses, write_inputs, write_settings
from tiny_models import adapter_weights, furthest

from safelora_fast.errors import SettingsError

pytest.importorskip(
    "llamafactory", reason="LLaMA-Factory is not installed: `make test-matrix` runs this in its own environment"
)
pytestmark = pytest.mark.slow  # to import


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("llamafactory"))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages"}
    data = {"file_name": "data.jsonl", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"tiny": data}))
    return folder


def settings(folder, name, **changes):
    return {
        "model_name_or_path": str(folder / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_target": "q_proj,k_proj,v_proj,o_proj",
        "dataset": "tiny",
        "dataset_dir": str(folder),
        "template": "default",
        "cutoff_len": 64,
        "output_dir": str(folder / name),
        "overwrite_cache": True,
        "preprocessing_num_workers": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "seed": 7,
        "safelora_fast": KL,
        **changes,
    }


def train(folder, name, monkeypatch, overrides=(), **changes):
    """Train; return the trainer and the adapter's weights."""
    from safelora_fast.trainers import llamafactory

    trainers = []
    former = llamafactory.DefendedSeq2SeqTrainer.train

    def note(self, *args, **kwargs):
        trainers.append(self)
        return former(self, *args, **kwargs)

    monkeypatch.setattr(llamafactory.DefendedSeq2SeqTrainer, "train", note)
    llamafactory.train(str(write_settings(folder / f"{name}.yaml", settings(folder, name, **changes))), overrides)
    return trainers[-1], adapter_weights(trainers[-1].model)


def test_the_log_resuming_and_shared_logits(folder, monkeypatch):
    from safelora_fast.trainers.llamafactory import DefendedSeq2SeqTrainer

    shared = shared_losses(monkeypatch)
    trainer, whole = train(folder, "whole", monkeypatch)
    assert len(shared) == 8
    kl = [entry["defense/kl"] for entry in losses(trainer)]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-5
    checkpoint = str(folder / "whole" / "checkpoint-2")
    _, resumed = train(folder, "resumed", monkeypatch, resume_from_checkpoint=checkpoint)
    assert furthest(whole, resumed) < 1e-6
    _, weak = train(folder, "weak", monkeypatch, ["safelora_fast.defenses.kl.weight=1e-9", "warmup_steps=0"])
    assert furthest(whole, weak) > 1e-3
    monkeypatch.setattr(DefendedSeq2SeqTrainer, "why_apart", lambda *_: "the test says so")
    shared.clear()
    apart, weights = train(folder, "apart", monkeypatch)
    assert not shared
    assert furthest(whole, weights) < 1e-5
    for ours, theirs in zip(losses(trainer), losses(apart), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_neat_packing(folder, monkeypatch):
    """Its masks have four dimensions. One row of all documents has the same KL as the documents in rows of their own."""
    feature = {"defenses": {**KL["defenses"], "feature_distance": {"weight": 1.0, "layers": 2}}}
    size = {"max_steps": 2, "safelora_fast": feature, "learning_rate": 0.05}
    rows, _ = train(folder, "rows", monkeypatch, per_device_train_batch_size=16, gradient_accumulation_steps=1, **size)
    packing = {"neat_packing": True, "cutoff_len": 1024, "per_device_train_batch_size": 1}
    packed, _ = train(folder, "packed", monkeypatch, gradient_accumulation_steps=1, **packing, **size)
    assert packed.train_dataset.num_rows == 1
    for name in ("defense/kl", "defense/feature_distance"):
        assert losses(packed)[-1][name] == pytest.approx(losses(rows)[-1][name], rel=1e-3), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"safelora_fast": None}, "safelora_fast: missing"),
        ({"safelora_fast": {"defenses": {"kll": True}}}, r"\.yaml:\d+: defenses.kll: unknown"),
        ({"stage": "dpo"}, "stage: is dpo"),
        ({"use_mca": True}, "use_mca: trains without LLaMA-Factory's own trainer"),
        ({"use_ray": True}, "use_ray: .* in processes of its own"),
    ],
)
def test_refusals(folder, changes, message, monkeypatch):
    with pytest.raises(SettingsError, match=message):
        train(folder, "wrong", monkeypatch, **changes)


def test_the_command_line_starts_no_processes_without_defenses(monkeypatch):
    from safelora_fast.trainers.llamafactory import main

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    with pytest.raises(SettingsError, match="torchrun --nproc-per-node"):
        main(["train", "x.yaml"])
    with pytest.raises(SettingsError, match="usage"):
        main(["chat"])
