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
from tiny_recipe import difference, write_recipe, write_rows

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


WATCHED = """
import os, sys
from safelora_fast.recipe import trainer

class Watched(trainer.RecipeTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            rows = self.processing_class.batch_decode(inputs["input_ids"], skip_special_tokens=False)
            with open(f"{os.environ['FED']}-{os.environ['RANK']}", "a") as file:
                file.writelines(f"{int(self.state.epoch)} {row.replace('<pad>', '')}\\n" for row in rows)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        if self.state.global_step == int(os.environ["STOP"]):
            raise KeyboardInterrupt
        return super().training_step(*args, **kwargs)

trainer.RecipeTrainer = Watched
from safelora_fast.cli import main
main()
"""


def fed_to_two(tiny, script, place, *words, stop=-1):
    """The rows of each epoch that two processes were given, sorted."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, *tiny.words("-q", *words)], env={**environment(), "FED": str(place), "STOP": str(stop)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert (done.returncode == 0) == (stop < 0), done.stderr
    lines = [line for rank in (0, 1) for line in place.with_name(f"{place.name}-{rank}").read_text().splitlines()]
    return {epoch: sorted(line[2:] for line in lines if line[0] == str(epoch)) for epoch in range(3)}


def test_two_processes_share_the_safe_rows_of_every_epoch(tmp_path):
    """With accumulation and a worker, and when a run goes on within its second epoch."""
    training = {"ddp_backend": "gloo", "num_train_epochs": 3, "save_steps": 1, "dataloader_num_workers": 1}
    safe = write_rows(tmp_path / "safe.jsonl", [{"prompt": f"safe {n}?", "completion": "kindly"} for n in range(8)])
    tiny = write_recipe(tmp_path, training=training, data={"safe": {"path": str(safe), "fraction": 0.34}})
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    epochs = fed_to_two(tiny, script, tmp_path / "whole")
    assert tiny.record()["steps"] == tiny.record()["plan"]["steps"] == 6
    safe_rows = [[row for row in epochs[epoch] if row.startswith("<user>safe ")] for epoch in range(3)]
    assert [len(rows) for rows in safe_rows] == [4, 4, 4]
    assert [len(epochs[epoch]) for epoch in range(3)] == [16, 16, 16]
    assert len({*safe_rows[0], *safe_rows[1]}) == 8
    tasks = [sorted(set(epochs[epoch]) - set(safe_rows[epoch])) for epoch in range(3)]
    assert tasks[0] == tasks[1] == tasks[2]
    assert len(tasks[0]) == 12
    tiny.edit(output={"folder": str(tmp_path / "stopped")})
    fed_to_two(tiny, script, tmp_path / "before", stop=3)
    after = fed_to_two(tiny, script, tmp_path / "after", "--resume")
    assert after[0] == []
    assert len(after[1]) == 8
    assert not set(after[1]) - set(epochs[1])
    assert after[2] == epochs[2]


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
