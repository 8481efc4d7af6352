"""`train` in separate processes: a kill, two processes that train together, and errors that need no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from tiny_recipe import tiny_rows, write_recipe, write_rows

from safelora_fast.recipe.trainer import RecipeTrainer

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_a_killed_run_can_be_resumed(tmp_path, call, monkeypatch):
    """Only the steps after the last complete checkpoint are repeated."""
    tiny = write_recipe(tmp_path, training={"num_train_epochs": 400, "save_steps": 20, "save_total_limit": 2})
    command = [sys.executable, "-m", "safelora_fast", *tiny.words("-q")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not list(tiny.output.glob("checkpoints/checkpoint-*/safelora_checkpoint.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.communicate(timeout=300) == (None, "")
    assert not (tiny.output / "adapter_model.safetensors").exists()
    sealed = tiny.output.glob("checkpoints/checkpoint-*/safelora_checkpoint.json")
    last = max(int(path.parent.name.partition("-")[2]) for path in sealed)

    class Short(RecipeTrainer):
        def training_step(self, *args, **kwargs):
            assert self.state.global_step >= last
            if self.state.global_step >= last + 3:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr("safelora_fast.recipe.trainer.RecipeTrainer", Short)
    resumed = call(*tiny.words("-q", "--resume"))
    assert resumed.code == 130
    assert f"interrupted after step {last + 3}; the checkpoint of step {last} is whole" in resumed.err


TWO_RUNS = """
import os, sys
from safelora_fast.cli import main
from safelora_fast.recipe import trainer

class Watched(trainer.RecipeTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            rows = self.processing_class.batch_decode(inputs["input_ids"], skip_special_tokens=False)
            with open(f"{STAGE}-{os.environ['RANK']}", "a") as file:
                file.writelines(f"{int(self.state.epoch)} {row.replace('<pad>', '')}\\n" for row in rows)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        if STAGE == "before" and self.state.global_step == 3:
            raise KeyboardInterrupt
        return super().training_step(*args, **kwargs)

trainer.RecipeTrainer = Watched
words = sys.argv
for STAGE, more in {"before": ["-q"], "after": ["--resume"]}.items():
    sys.argv = [*words, *more]
    try:
        main()
    except SystemExit as stopped:
        assert (stopped.code or 0) == {"before": 130, "after": 0}[STAGE], stopped.code
"""


@pytest.mark.slow
def test_two_processes_share_the_examples_of_every_epoch(tmp_path):
    """With safe examples, accumulation and a worker, the run resumes within its second epoch."""
    training = {"ddp_backend": "gloo", "num_train_epochs": 3, "save_steps": 1, "dataloader_num_workers": 1}
    safe = write_rows(tmp_path / "safe.jsonl", [{"prompt": f"safe {n}?", "completion": "kindly"} for n in range(8)])
    data = {"eval": 0.25, "safe": {"path": str(safe), "fraction": 0.34}}
    tiny = write_recipe(tmp_path, training=training, data=data)
    write_rows(tiny.data, tiny_rows(16))
    (tmp_path / "two_runs.py").write_text(TWO_RUNS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "two_runs.py"]
    done = subprocess.run(
        [*launch, *tiny.words()],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == done.stdout.count("2 × 2 × 2 processes") == 1

    def fed(stage):
        """Return the examples of each epoch that the two processes received."""
        lines = [line for rank in (0, 1) for line in (tmp_path / f"{stage}-{rank}").read_text().splitlines()]
        return [[line[2:] for line in lines if line.startswith(str(epoch))] for epoch in range(3)]

    before, after = fed("before"), fed("after")
    assert [len(rows) for rows in before] == [16, 8, 0]
    assert [len(rows) for rows in after] == [0, 8, 16]
    safe_rows, tasks = [], []
    for rows in map(Counter, (a + b for a, b in zip(before, after, strict=True))):
        safe_rows.append(Counter({row: count for row, count in rows.items() if row.startswith("<user>safe ")}))
        tasks.append(rows - safe_rows[-1])
    assert tasks[0] == tasks[1] == tasks[2]
    assert len(tasks[0]) == 12
    assert [rows.total() for rows in safe_rows] == [4, 4, 4]
    assert len(safe_rows[0] + safe_rows[1]) == 8  # every safe example is used before one repeats
    record = tiny.record()
    assert (record["finished"], record["steps"], record["plan"]["steps"]) == (True, 6, 6)
    assert record["metrics"]["defense/kl"]["last"] > 0
    assert any(tensor.any() for name, tensor in tiny.weights().items() if "lora_B" in name)


REFUSALS = {
    "--help": (0, ""),
    "training.learning_rat=1": (2, "error: command line: training.learning_rat: unknown; did you mean learning_rate\n"),
    "defenses.kl.weight=-1": (2, "error: command line: defenses.kl.weight: KL: weight is -1.0, "),
    "output.folder=.": (2, "is the current folder; name a folder to make"),
}
NO_TORCH = """
import contextlib, io, json, sys
from safelora_fast.cli import main

path, words = json.loads(sys.argv[1])
results = {}
for word in words:
    sys.argv = ["safelora-fast", "train", path, word]
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stopped:
            results[word] = [stopped.code or 0, err.buffer.getvalue().decode()]
print(json.dumps([results, [name for name in ("torch", "transformers", "datasets") if name in sys.modules]]))
"""


def test_help_and_errors_need_no_torch(tmp_path):
    argument = json.dumps([str(write_recipe(tmp_path).path), list(REFUSALS)])
    done = subprocess.run([sys.executable, "-c", NO_TORCH, argument], cwd=tmp_path, capture_output=True, check=True)
    results, heavy = json.loads(done.stdout)
    assert heavy == []
    for word, (code, message) in REFUSALS.items():
        assert results[word][0] == code
        assert message in results[word][1]
        assert results[word][1].count("\n") == bool(message)
