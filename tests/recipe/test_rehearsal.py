"""A dry run refuses what the run would: it puts the trainer together on the model's outline."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
from command_line import call
from tiny_recipe import write_recipe

__all__ = ["call"]

OPTIMIZERS = {
    "adamw_8bit": "bitsandbytes",
    "paged_lion_8bit": "bitsandbytes",
    "galore_adamw": "galore_torch",
    "apollo_adamw": "apollo_torch",
    "lomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free_adamw": "schedulefree",
    "adamw_torch_4bit": "torchao",
    "stable_adamw": "optimi",
    "adamw_anyprecision": "torchdistx",
}
TRACKERS = ["wandb", "tensorboard"]


@pytest.fixture(autouse=True)
def environment_of_its_own():
    """Older versions of transformers say FSDP and compilation by variables of the whole process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def tiny(tmp_path):
    return write_recipe(tmp_path)


def refusal(call, capsys, tiny, *words):
    capsys.readouterr()
    code, out, err = call(*tiny.words(*words, "--dry-run"))
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1
    assert not tiny.output.exists()
    return err


@pytest.mark.parametrize(("optimizer", "package"), OPTIMIZERS.items())
def test_an_optimizer_whose_package_is_missing(tiny, call, capsys, optimizer, package):
    if find_spec(package) is not None or (package == "optimi" and find_spec("torch_optimi") is not None):
        pytest.skip(f"{package} is installed")
    err = refusal(call, capsys, tiny, f"training.optim={optimizer}")
    assert err.startswith(f"error: command line: training.optim: {optimizer}")
    assert "install" in err


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_whose_package_is_missing(tiny, call, capsys, tracker):
    if find_spec(tracker) is not None:
        pytest.skip(f"{tracker} is installed")
    err = refusal(call, capsys, tiny, f"training.report_to={tracker}")
    assert "install" in err
    assert "training" in err


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("training.lr_scheduler_type=cosine_with_min_lr",), "training.lr_scheduler_type: cosine_with_min_lr: "),
        (("training.lr_scheduler_kwargs={foo: 3}",), "training.lr_scheduler_type: "),
        (("training.dataloader_persistent_workers=true",), "persistent_workers"),
        (("training.torch_compile=true",), "torch_compile wraps the model"),
        (("training.fsdp=full_shard",), "training"),
        (("training.packing=true", "training.packing_strategy=odd"), "packing"),
        (("model.attention=flash_attention_2",), "the model cannot be loaded: "),
        (
            ("model.attention=flex_attention", "model.device=cpu"),
            "flex_attention has no gradients on the CPU: choose sdpa",
        ),
        (("training.adam_beta1=2.0",), "training.optim: Invalid beta parameter"),
        (("lora.modules_to_save=[lm_head]",), "KL: the output head is adapted or trained"),
        (("output.folder=/dev/null/out",), "/dev/null is not a folder"),
    ],
    ids=str,
)
def test_what_does_not_go_together(tiny, call, capsys, words, key):
    if "flash" in words[0] and find_spec("flash_attn") is not None:
        pytest.skip("flash attention is installed")
    assert key in refusal(call, capsys, tiny, *words)


def test_a_missing_kernel_is_asked_for_before_the_weights(tiny, call, capsys):
    if find_spec("liger_kernel") is not None:
        pytest.skip("liger-kernel is installed")
    err = refusal(call, capsys, tiny, "training.use_liger_kernel=true")
    assert "training.use_liger_kernel: needs liger-kernel: pip install liger-kernel" in err


def test_a_run_that_is_there_is_said(tiny, call):
    assert call(*tiny.words("training.max_steps=1", "-q")).code == 0
    before = {path: path.stat().st_mtime_ns for path in tiny.output.rglob("*")}
    planned = call(*tiny.words("training.max_steps=1", "--dry-run"))
    assert planned.code == 0
    assert f"warning: {tiny.output}: holds a run already; pass --resume" in planned.err
    assert {path: path.stat().st_mtime_ns for path in tiny.output.rglob("*")} == before
    assert "holds a run" not in call(*tiny.words("training.max_steps=1", "--dry-run", "--overwrite")).err


def test_a_disk_without_room_is_seen(tiny, call, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    assert "bytes are needed" in refusal(call, capsys, tiny)


def test_the_rehearsal_leaves_the_run_as_it_was(tiny, call, monkeypatch):
    """The same weights as without it: neither a seed nor the arguments are touched."""
    assert call(*tiny.words("-q")).code == 0
    first = tiny.weights()
    monkeypatch.setattr("safelora_fast.recipe.prepare.rehearse", lambda *_: None)
    assert call(*tiny.words("-q", "--overwrite")).code == 0
    assert all((tiny.weights()[name] == tensor).all() for name, tensor in first.items())
