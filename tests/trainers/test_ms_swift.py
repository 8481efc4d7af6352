"""ms-swift's own training on the CPU with the plugin: cut labels, safe rows by channel, resuming, and refusals."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from other_trainers import losses, write_inputs, write_settings
from tiny_models import adapter_weights, furthest

from safelora_fast.data.spans import read_spans
from safelora_fast.errors import DataError, SettingsError

pytest.importorskip(
    "swift", reason="ms-swift is not installed: `make test-matrix` runs this in an environment of its own"
)
pytestmark = pytest.mark.slow  # to import

SAFE_KL = {"defenses": {"kl": {"weight": 30.0, "tokens": "safe"}}}
COMPLETION_KL = {"defenses": {"kl": {"weight": 30.0, "tokens": "completion"}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("swift"))


@pytest.fixture
def mapping(monkeypatch):
    """Undo what the plugin changes."""
    from swift.trainers import TrainerFactory

    monkeypatch.setattr(TrainerFactory, "TRAINER_MAPPING", dict(TrainerFactory.TRAINER_MAPPING))
    for name in [name for name in sys.modules if name.startswith("_swift_external_")]:
        del sys.modules[name]


def train(folder, name, monkeypatch, settings=None, **changes):
    """Train as `swift sft` does; return the trainer and the adapter's weights."""
    from swift.pipelines import SwiftSft
    from swift.trainers import Seq2SeqTrainer

    trainers = []
    former = Seq2SeqTrainer.train

    def note(self, *args, **kwargs):
        trainers.append(self)
        return former(self, *args, **kwargs)

    monkeypatch.setattr(Seq2SeqTrainer, "train", note)
    values = {
        "model": folder / "model",
        "model_type": "llama",
        "template": "default",
        "dataset": folder / "data.jsonl",
        "tuner_type": "lora",
        "lora_rank": 4,
        "lora_alpha": 8,
        "lora_dropout": 0,
        "target_modules": "all-linear",
        "torch_dtype": "float32",
        "output_dir": folder / name,
        "add_version": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "max_length": 128,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 2,
        "split_dataset_ratio": 0,
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "report_to": "none",
        "use_cpu": True,
        "seed": 7,
        **changes,
    }
    if settings is not None:
        from safelora_fast.trainers.ms_swift import PLUGIN

        monkeypatch.setenv("SAFELORA_FAST", str(write_settings(folder / f"{name}.yaml", settings)))
        values["external_plugins"] = PLUGIN
    SwiftSft([word for key, value in values.items() for word in (f"--{key}", str(value))]).main()
    return trainers[-1], adapter_weights(trainers[-1].model)


@pytest.mark.usefixtures("mapping")
@pytest.mark.parametrize("batch", [1, 2])
def test_labels_that_were_cut(folder, monkeypatch, batch):
    """Whether ms-swift cuts its labels or not, and whatever it cuts, defenses see the same tokens."""
    runs = {}
    for cut in (True, False):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch, "max_steps": 2}
        trainer, weights = train(
            folder, f"cut-{cut}-{batch}", monkeypatch, COMPLETION_KL, use_logits_to_keep=cut, **sizes
        )
        assert trainer.args.use_logits_to_keep is cut
        runs[cut] = losses(trainer), weights
    assert furthest(runs[True][1], runs[False][1]) < 1e-5
    for ours, theirs in zip(runs[True][0], runs[False][0], strict=True):
        assert ours["defense/kl"] == pytest.approx(theirs["defense/kl"], rel=1e-4, abs=1e-7)
    assert runs[True][0][-1]["defense/kl"] > 1e-5


@pytest.mark.usefixtures("mapping")
def test_safe_rows_and_resuming(folder, monkeypatch):
    _, plain = train(folder, "plain", monkeypatch)
    trainer, whole = train(folder, "whole", monkeypatch, SAFE_KL)
    assert losses(trainer)[-1]["defense/kl"] > 1e-5
    assert furthest(plain, whole) > 1e-3
    _, resumed = train(folder, "whole", monkeypatch, SAFE_KL, resume_from_checkpoint=folder / "whole" / "checkpoint-2")
    assert furthest(whole, resumed) < 1e-6


def test_channels_of_documents_in_one_row():
    from safelora_fast.trainers.ms_swift import ChannelCollator

    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    batch = {"input_ids": positions + 1, "position_ids": positions, "channel": ["task", "safe", None]}
    tagged = ChannelCollator(lambda _: dict(batch))([])
    assert read_spans(tagged).safe.tolist() == [[False] * 3 + [True] * 2 + [False] * 3]
    with pytest.raises(DataError, match="2 channels for 3 documents"):
        ChannelCollator(lambda _: {**batch, "channel": ["task", "safe"]})([])


@pytest.mark.usefixtures("mapping")
def test_other_tasks_and_missing_settings_are_refused(monkeypatch):
    from swift.trainers import TrainerFactory

    from safelora_fast.trainers.ms_swift import check_whole_sequences, install, refuse

    monkeypatch.delenv("SAFELORA_FAST", raising=False)
    with pytest.raises(SettingsError, match="SAFELORA_FAST is not set"):
        install()
    assert refuse.__name__ not in TrainerFactory.TRAINER_MAPPING["dpo"]
    with pytest.raises(SettingsError, match="swift sft"):
        refuse(model=None)
    with pytest.raises(SettingsError, match="sequence_parallel_size > 1"):
        check_whole_sequences(SimpleNamespace(sequence_parallel_size=2))
