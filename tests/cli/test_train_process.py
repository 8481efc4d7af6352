"""`train` in a process of its own: Ctrl-C, an order to end, a full disk, and errors that need no torch."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
from tiny_recipe import difference, write_recipe

LONG = {"training": {"num_train_epochs": 400, "save_steps": 20, "save_total_limit": 2}}


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(words, **options):
    command = [sys.executable, "-m", "safelora_fast", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment(), text=True, **pipes, **options)


def wait_for_a_checkpoint(process, tiny):
    end = time.monotonic() + 300
    while not list(tiny.output.glob("checkpoints/checkpoint-*/safelora_checkpoint.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_run_can_be_resumed(tmp_path, number, code):
    tiny = write_recipe(tmp_path, **LONG)
    process = start(tiny.words("-q"))
    wait_for_a_checkpoint(process, tiny)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (code, "")
    assert "Traceback" not in err
    if number != signal.SIGKILL:
        assert re.search(
            r"interrupted after step (\d+); the checkpoint of step \1 is whole; to go on: ", err.splitlines()[-1]
        )
    whole = [path for path in (tiny.output / "checkpoints").iterdir() if (path / "safelora_checkpoint.json").exists()]
    assert whole
    assert not (tiny.output / "adapter_model.safetensors").exists()
    last = max(int(path.name.partition("-")[2]) for path in whole)
    # Only the steps after the last whole checkpoint are made again.
    program = (
        "import sys; from safelora_fast.recipe import trainer\n"
        "class Short(trainer.RecipeTrainer):\n"
        "    def training_step(self, *a, **k):\n"
        f"        assert self.state.global_step >= {last}\n"
        f"        if self.state.global_step >= {last} + 3: raise KeyboardInterrupt\n"
        "        return super().training_step(*a, **k)\n"
        "trainer.RecipeTrainer = Short\n"
        "from safelora_fast.cli import main\n"
        "main()"
    )
    command = [sys.executable, "-c", program, *tiny.words("-q", "--resume")]
    resumed = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert resumed.returncode == 130, resumed.stderr
    assert f"interrupted after step {last + 3}; the checkpoint of step" in resumed.stderr


def test_a_full_disk(tmp_path):
    """A file may grow to 20 kB: enough for the record, too little for the optimiser's state."""
    tiny = write_recipe(tmp_path)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(tiny.words("-q"), preexec_fn=limit)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, ""), err
    assert err.startswith(f"error: {tiny.output}: cannot be written")
    assert "make room and pass --resume" in err
    assert len(err.splitlines()) == 1
    assert not (tiny.output / "adapter_model.safetensors").exists()
    done = subprocess.run(
        [sys.executable, "-m", "safelora_fast", *tiny.words("-q", "--resume")],
        env=environment(),
        check=False,
        timeout=300,
    )
    assert done.returncode == 0
    fresh = write_recipe(tmp_path / "fresh")
    subprocess.run(
        [sys.executable, "-m", "safelora_fast", *fresh.words("-q")], env=environment(), check=True, timeout=300
    )
    assert difference(tiny.weights(), fresh.weights()) == 0


def test_two_processes(tmp_path):
    """The first process talks and writes; both make the same steps."""
    tiny = write_recipe(
        tmp_path, training={"ddp_backend": "gloo", "gradient_accumulation_steps": 1}, data={"eval": 0.25}
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "safelora_fast",
    ]
    done = subprocess.run(
        [*command, *tiny.words()], env=environment(), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == done.stdout.count("2 × 1 × 2 processes") == 1
    record = tiny.record()
    assert (record["finished"], record["steps"], record["plan"]["steps"]) == (True, 6, 6)
    assert record["metrics"]["defense/kl"]["last"] > 0
    assert any(tensor.any() for name, tensor in tiny.weights().items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--help"], 0, ""),
        (
            ["training.learning_rat=1"],
            2,
            "error: command line: training.learning_rat: unknown; did you mean learning_rate",
        ),
        (["defenses.kl.weight=-1"], 2, "error: command line: defenses.kl.weight: KL: weight is -1"),
        (["lora.rank=4"], 2, "error: command line: lora.rank: unknown"),
        (["output.folder=."], 2, "is the current folder; name a folder to make"),
    ],
)
def test_help_and_errors_need_no_torch(tmp_path, words, code, message):
    tiny = write_recipe(tmp_path)
    program = (
        "import sys\nfrom safelora_fast.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print('heavy:', [m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *tiny.words(*words)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith("heavy: []\n")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == (1 if message else 0)
