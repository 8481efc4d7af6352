"""The snippets in docs/fleets.md run: each worker of a scheduler projects its share, and together they project all."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import yaml
from plain_pair import write_adapter, write_pair

DOCUMENT = Path(__file__).parents[2] / "docs" / "fleets.md"
ADAPTERS = 5


def snippets(language):
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def slurm():
    (script,) = (text for text in snippets("bash") if "#SBATCH" in text)
    first, last = map(int, re.search(r"--array=(\d+)-(\d+)", script).groups())
    array = {"MIN": first, "MAX": last, "COUNT": last - first + 1}
    variables = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
    return script.splitlines()[-1], [{**variables, "SLURM_ARRAY_TASK_ID": str(i)} for i in range(first, last + 1)]


def kubernetes():
    job = yaml.safe_load(snippets("yaml")[0])
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    count = job["spec"]["completions"]
    return shlex.join(container["command"]), [{"JOB_COMPLETION_INDEX": str(index)} for index in range(count)]


def skypilot():
    task = yaml.safe_load(snippets("yaml")[1])
    count = task["num_nodes"]
    nodes = [{"SKYPILOT_NODE_RANK": str(index), "SKYPILOT_NUM_NODES": str(count)} for index in range(count)]
    return task["run"].strip(), nodes


def write_fleet(folder):
    """Write a pair, adapters and their list; return what replaces the names of models in the snippets."""
    pair = write_pair(folder / "pair")
    rows = [{"id": f"a{seed}", "adapter": str(write_adapter(folder / f"a{seed}", seed))} for seed in range(ADAPTERS)]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"ALIGNED": str(pair.aligned), "BASE": str(pair.base)}


@pytest.mark.parametrize("scheduler", [slurm, kubernetes, skypilot])
def test_workers_of_a_scheduler(scheduler, call, tmp_path, monkeypatch):
    names = write_fleet(tmp_path)
    monkeypatch.chdir(tmp_path)
    command, workers = scheduler()
    assert len(workers) > 1
    words = [names.get(word, word) for word in shlex.split(command)]
    assert words.pop(0) == "safelora-fast"
    for index, variables in enumerate(workers):
        with monkeypatch.context() as environment:
            for name, value in variables.items():
                environment.setenv(name, value)
            code, out, err = call(*words, "--quiet")
        share = [path.name for path in (tmp_path / "safe").glob("a*")] if (tmp_path / "safe").exists() else []
        assert (code, out) == (0, "")
        assert f"shard {index}/{len(workers)}, from " in err
        assert len(share) == len([i for i in range(ADAPTERS) if i % len(workers) <= index])
    assert sorted(share) == [f"a{seed}" for seed in range(ADAPTERS)]


def test_jobs_of_the_hub(call, tmp_path, monkeypatch, capsys):
    """Nothing is sent: run_job is replaced by a function with its signature, and the commands run here."""
    names = write_fleet(tmp_path)
    monkeypatch.chdir(tmp_path)
    (program,) = (text for text in snippets("python") if "run_job" in text)
    with monkeypatch.context() as patch:
        sent = create_autospec(huggingface_hub.run_job)
        patch.setattr(huggingface_hub, "run_job", sent)
        exec(compile(program, "snippet", "exec"), {})
    capsys.readouterr()
    assert len(sent.call_args_list) > 1
    for one in sent.call_args_list:
        assert one.kwargs["flavor"] in {hardware.value for hardware in huggingface_hub.JobHardware}
        words = [names.get(word, word) for word in one.kwargs["command"]]
        assert words.pop(0) == "safelora-fast"
        assert call(*words, "--quiet")[:2] == (0, "")
    assert sorted(path.name for path in (tmp_path / "safe").iterdir()) == [f"a{seed}" for seed in range(ADAPTERS)]


@pytest.fixture
def two_nodes():
    """Return the address of a Ray cluster with two nodes of one CPU on this machine."""
    utilities = pytest.importorskip("ray.cluster_utils")
    cluster = utilities.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "package"), [(0, "datatrove"), (1, "ray")])
def test_steps_of_other_engines(request, tmp_path, number, package):
    pytest.importorskip(package)
    address = {"RAY_ADDRESS": request.getfixturevalue("two_nodes")} if package == "ray" else {}
    program = [text for text in snippets("python") if "run_job" not in text][number]
    shared = {"list.jsonl": str(tmp_path / "list.jsonl"), "safe": str(tmp_path / "safe")}  # seen by all nodes
    for name, path in {**write_fleet(tmp_path), **shared}.items():
        program = program.replace(f'"{name}"', repr(path))
    (tmp_path / "worker.py").write_text(program)
    command = [sys.executable, "worker.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **address}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "safe").iterdir()) == [f"a{seed}" for seed in range(ADAPTERS)]
