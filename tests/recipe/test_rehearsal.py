"""A dry run constructs the trainer on the model's outline and raises the same errors as the run."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
from tiny_recipe import write_recipe

from safelora_fast.errors import SafeLoraFastError
from safelora_fast.models.quiet_libraries import quiet_libraries
from safelora_fast.recipe.prepare import prepare
from safelora_fast.recipe.recipe import load_recipe

MISSING = {
    "training.optim=adamw_8bit": ("bitsandbytes", "training.optim: adamw_8bit"),
    "training.optim=galore_adamw": ("galore_torch", "training.optim: galore_adamw"),
    "training.optim=lomo": ("lomo_optim", "training.optim: lomo"),
    "training.optim=schedule_free_adamw": ("schedulefree", "training.optim: schedule_free_adamw"),
    "training.optim=adamw_torch_4bit": ("torchao", "training.optim: adamw_torch_4bit"),
    "training.report_to=wandb": ("wandb", "training"),
    "training.use_liger_kernel=true": ("liger_kernel", "training.use_liger_kernel: needs liger-kernel: pip install"),
}


@pytest.fixture(autouse=True)
def environment_of_its_own():
    """Restore environment variables: older versions of transformers set some for FSDP and compilation."""
    before = dict(os.environ)
    with quiet_libraries():
        yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def tiny(tmp_path):
    return write_recipe(tmp_path)


def refusal(tiny, *words):
    with pytest.raises(SafeLoraFastError) as refused:
        prepare(load_recipe(tiny.path, words))
    assert "\n" not in str(refused.value)
    assert not tiny.output.exists()
    return str(refused.value)


@pytest.mark.parametrize("word", MISSING)
def test_a_package_that_is_missing(tiny, word):
    package, message = MISSING[word]
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    said = refusal(tiny, word)
    assert said.startswith(f"command line: {message}")
    assert "install" in said


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
        (("model.attention=flex_attention",), "flex_attention has no gradients on the CPU: choose sdpa"),
        (("training.adam_beta1=2.0",), "training.optim: Invalid beta parameter"),
        (("lora.modules_to_save=[lm_head]",), "KL: the output head is adapted or trained"),
    ],
    ids=str,
)
def test_what_does_not_go_together(tiny, words, key):
    if "flash" in words[0] and find_spec("flash_attn") is not None:
        pytest.skip("flash attention is installed")
    assert key in refusal(tiny, *words)


def test_a_run_that_is_there_is_said(tiny, call):
    assert call(*tiny.words("training.max_steps=1", "-q")).code == 0
    before = {path: path.stat().st_mtime_ns for path in tiny.output.rglob("*")}
    planned = call(*tiny.words("training.max_steps=1", "--dry-run"))
    assert planned.code == 0
    assert f"warning: {tiny.output}: holds a run already; pass --resume" in planned.err
    assert {path: path.stat().st_mtime_ns for path in tiny.output.rglob("*")} == before
    assert "holds a run" not in call(*tiny.words("training.max_steps=1", "--dry-run", "--overwrite")).err


def test_an_output_that_cannot_be_written_is_seen(tiny, call, monkeypatch):
    assert "/dev/null is not a folder" in call(*tiny.words("--dry-run", "output.folder=/dev/null/out")).err
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    result = call(*tiny.words("--dry-run"))
    assert (result.code, result.out) == (2, "")
    assert "bytes are needed" in result.err


def test_the_rehearsal_leaves_the_run_as_it_was(tiny, call, monkeypatch):
    """The trained weights are the same as without a rehearsal: it changes neither random state nor arguments."""
    words = ("-q", "training.max_steps=2")
    assert call(*tiny.words(*words)).code == 0
    first = tiny.weights()
    monkeypatch.setattr("safelora_fast.recipe.prepare.rehearse", lambda *_: None)
    assert call(*tiny.words(*words, "--overwrite")).code == 0
    assert all((tiny.weights()[name] == tensor).all() for name, tensor in first.items())
