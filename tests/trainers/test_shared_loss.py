"""Trainers whose cross-entropy comes from KL's logits: same weights and log, without running the model's own head."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_models import adapter_weights, fill_adapter, furthest, tiny_peft_model
from train_runs import run_transformers, run_trl, trl_fuses_the_head
from transformers import Trainer
from trl import SFTTrainer

import safelora_fast.trainers.transformers as mixin
from safelora_fast.defenses import KL, FeatureDistance
from safelora_fast.trainers.trl import DefendedSFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")  # TRL sets it

RUNS = {"transformers": run_transformers, "trl": run_trl}
SPEC = {"batch": 2, "accumulation": 2, "steps": 2}


needs_fused_head = pytest.mark.skipif(not trl_fuses_the_head(), reason="this TRL reads the logits for its metrics")


class Watched:
    """A model, and the number of positions on which its head runs with gradients."""

    def __init__(self, **settings):
        self.model = tiny_peft_model(**settings)
        self.positions = 0
        self.model.get_base_model().lm_head.register_forward_pre_hook(self._count)

    def _count(self, _module, args):
        if torch.is_grad_enabled():
            self.positions += args[0].shape[:-1].numel()


def train(kind, folder, *, spec=SPEC, share_logits=True, defenses=None, settings=None, **kwargs):
    """Train, and return (weights, training logs, number of positions on which the head ran)."""
    watched = Watched(**(settings or {}))
    defenses = [KL(30.0, tokens="completion"), FeatureDistance(30.0, layers=2)] if defenses is None else defenses
    if (spec.get("arguments", {}).get("gradient_checkpointing_kwargs") or {}).get("use_reentrant"):
        watched.model.enable_input_require_grads()  # before transformers 5, the caller must do this
    _, trainer = RUNS[kind](spec, folder, watched.model, defenses=defenses, share_logits=share_logits, **kwargs)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return adapter_weights(watched.model), logs, watched.positions


def told(caplog):
    return [record.message.split(": ", 1)[1] for record in caplog.records if "logits of its own" in record.message]


def same(left, right):
    assert furthest(left[0], right[0]) < 1e-5
    assert len(left[1]) == len(right[1]) > 0
    for ours, theirs in zip(left[1], right[1], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"defense/time_share"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


@pytest.mark.parametrize("kind", ["transformers", pytest.param("trl", marks=needs_fused_head)])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"average_tokens_across_devices": False},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=str,
)
def test_the_same_training_without_the_head(kind, arguments, tmp_path, caplog):
    spec = {**SPEC, "arguments": arguments}
    with caplog.at_level(logging.INFO, logger="safelora_fast"):
        shared = train(kind, tmp_path / "shared", spec=spec, settings={"dropout": 0.2})
    apart = train(kind, tmp_path / "apart", spec=spec, share_logits=False, settings={"dropout": 0.2})
    assert told(caplog) == []
    assert shared[2] == 0
    assert apart[2] > 0 or kind == "trl"  # TRL multiplies by the head's weight
    same(shared, apart)


@needs_fused_head
@pytest.mark.parametrize(
    "arguments", [{"packing": True, "max_length": 24}, {"padding_free": True, "max_length": None}], ids=str
)
def test_rows_without_padding(arguments, tmp_path, caplog):
    spec = {"batch": 4, "accumulation": 2, "arguments": arguments}
    with caplog.at_level(logging.INFO, logger="safelora_fast"):
        shared = train("trl", tmp_path / "shared", spec=spec)
    assert told(caplog) == []
    same(shared, train("trl", tmp_path / "apart", spec=spec, share_logits=False))


@needs_fused_head
def test_trls_own_metrics_are_logged(tmp_path):
    """With a negligible weight of the defense, entropy, accuracy and tokens equal those of TRL itself."""
    spec = {"batch": 4, "arguments": {"learning_rate": 1e-9}}
    watched = Watched()
    _, plain = run_trl(spec, tmp_path / "plain", watched.model, trainer_class=SFTTrainer)
    _, logs, _ = train("trl", tmp_path / "defended", spec=spec, defenses=[KL(1e-20)])
    theirs = next(entry for entry in plain.state.log_history if "loss" in entry)
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        assert logs[0][name] == pytest.approx(theirs[name], rel=1e-5), name


def test_a_model_that_takes_no_loss_arguments(tmp_path):
    """Its loss is a mean, and the Trainer divides by the accumulation steps."""
    runs = []
    for share in (True, False):
        watched = Watched()
        watched.model.get_base_model().accepts_loss_kwargs = False
        spec = {"batch": 2, "accumulation": 4}
        run_transformers(spec, tmp_path, watched.model, defenses=[KL(30.0)], share_logits=share)
        runs.append(adapter_weights(watched.model))
        assert (watched.positions == 0) is share
    assert furthest(*runs) < 1e-5


class WithPenalty(mixin.DefendedMixin, Trainer):
    """Overrides compute_loss on top of the mixin, and requests the outputs."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + 1e-3 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + 1e-3 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class DefendedOwnLoss(mixin.DefendedMixin, OwnLoss):
    pass


def double(outputs, labels, num_items_in_batch=None):
    loss = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return 2 * loss / num_items_in_batch


@pytest.mark.parametrize(
    ("reason", "kwargs", "arguments"),
    [
        ("labels are smoothed", {}, {"label_smoothing_factor": 0.1}),
        ("compute_loss_func makes the loss", {"compute_loss_func": double}, {}),
        ("OwnLoss has a compute_loss of its own", {"trainer_class": DefendedOwnLoss}, {}),
        ("the outputs are requested", {"trainer_class": WithPenalty}, {}),
    ],
)
def test_losses_that_are_not_plain_stay_apart(reason, kwargs, arguments, tmp_path, caplog):
    spec = {**SPEC, "arguments": arguments}
    with caplog.at_level(logging.INFO, logger="safelora_fast"):
        wanted = train("transformers", tmp_path / "wanted", spec=spec, **kwargs)
    assert told(caplog) == [reason]
    assert wanted[2] > 0
    same(wanted, train("transformers", tmp_path / "unwanted", spec=spec, share_logits=False, **kwargs))


@needs_fused_head
def test_trls_other_loss_stays_apart(tmp_path, caplog):
    spec = {**SPEC, "arguments": {"loss_type": "dft"}}
    with caplog.at_level(logging.INFO, logger="safelora_fast"):
        wanted = train("trl", tmp_path / "wanted", spec=spec)
    assert told(caplog) == ["loss_type is dft"]
    same(wanted, train("trl", tmp_path / "unwanted", spec=spec, share_logits=False))


@needs_fused_head
def test_the_trainer_has_the_last_word_on_what_a_label_counts(tmp_path, caplog, monkeypatch):
    """A TRL version that scales its loss differently is detected."""
    right = train("trl", tmp_path / "right", share_logits=False)
    weight = mixin.label_weight
    monkeypatch.setattr(mixin, "label_weight", lambda *args: 3 * weight(*args))
    with caplog.at_level(logging.INFO, logger="safelora_fast"):
        noticed = train("trl", tmp_path / "noticed")
    assert len(told(caplog)) == 1
    assert told(caplog)[0].startswith("SFTTrainer makes ")
    assert furthest(right[0], noticed[0]) < 1e-5


def test_a_users_own_sft_trainer_with_the_mixin(tmp_path):
    class Mine(SFTTrainer):
        pass

    class Defended(mixin.DefendedMixin, Mine):
        pass

    runs = [train("trl", tmp_path, trainer_class=kind) for kind in (Defended, DefendedSFTTrainer)]
    same(*runs)
    assert runs[0][2] == runs[1][2]


def test_evaluation_runs_the_head(tmp_path):
    watched = Watched()
    fill_adapter(watched.model, seed=3)
    _, trainer = run_transformers(SPEC, tmp_path, watched.model, defenses=[KL(30.0)])
    assert watched.positions == 0
    watched.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.compute_loss(watched.model, dict(batch)).item() == watched.model(**batch).loss.item()
