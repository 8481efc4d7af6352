"""Every command in an environment without the extras: one line names the command and the missing package.

All commands run in one separate process that can import only the base requirements.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from plain_pair import write_pair

from safelora_fast import project_adapter

EXTRAS = (
    "torch", "transformers", "trl", "peft", "datasets", "accelerate", "inspect_ai", "lm_eval", "openai", "matplotlib", "gguf",
)  # fmt: skip
PROGRAM = """
import contextlib, importlib.abc, importlib.util, io, json, sys

blocked, commands = json.loads(sys.argv[1])


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in blocked else find(name, package)
sys.meta_path.insert(0, Blocker())
from safelora_fast.cli import main

results = {}
for name, words in commands.items():
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    sys.argv = ["safelora-fast", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException as error:
            code = repr(error)
    results[name] = [code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()]
print(json.dumps(results), file=sys.__stdout__)
"""
RECIPE = "model: {path: m}\ndata: {path: d}\noutput: {folder: o}\n"
COMPARISON = "recipe: {model: {path: m}, data: {path: d}}\nruns: {none: {}}\nmeasure: {general: g}\noutput: o\n"
PAIR = ("--aligned", "in/aligned", "--base", "in/base")
BUILD = ("subspace", "build", *PAIR, "--rank", "2", "--output")
EXTRACT = ("persona", "extract", "--model", "m", "--trait", "malicious", "--output", "o.safetensors")
NEEDS = {
    "train": ("training needs torch", "train", "recipe.yaml"),
    "margin": ("margin needs torch", "margin", "--model", "m"),
    "evaluate": ("evaluate needs torch", "evaluate", "--model", "m", "--judge", "a/b", "--output", "o"),
    "tasks": ("evaluate needs torch", "evaluate", "--model", "m", "--tasks", "ifeval", "--output", "o"),
    "select": ("select needs torch", "select", "rows.jsonl", "--model", "m", "--misaligned", "a", "--output", "o"),
    "persona extract": ("persona extract needs torch", *EXTRACT),
    "operator-swap score": ("operator-swap score needs torch", "operator-swap", "score", "swap", "--model", "m"),
    "rejudge": ("judging needs inspect-ai", "rejudge", "log", "--judge", "a/b"),
    "screen": ("screen needs torch", "screen", "rows.jsonl", "--model", "m", "--misaligned", "a", "--output", "o"),
    "compare": ("needs torch", "compare", "compare.yaml"),
    "demo": ("the demo needs torch", "demo", "--output", "o"),
    "demo --train": ("the demo needs torch", "demo", "--train", "--output", "o"),
    "self-test": ("--self-test needs torch", "env", "--self-test"),
    "plot": ("a plot needs matplotlib", "inspect", "in/adapter", *PAIR, "--plot", "p.png"),
    "device": ("needs torch", *BUILD, "o.safetensors", "--device", "cuda"),
}
DO_WITHOUT = {
    "inspect": ("inspect", "in/adapter", *PAIR, "--select", "all"),
    "project": ("project", "in/adapter", *PAIR, "--output", "projected", "--select", "all"),
    "subspace build": (*BUILD, "s.safetensors"),
    "operator-swap make": ("operator-swap", "make", "--output", "swap", "--rows", "8", "--held-out", "4"),
    "examples": ("examples",),
    "env": ("env",),
}


def run(folder, blocked, commands):
    words = [sys.executable, "-c", PROGRAM, json.dumps([blocked, commands])]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    write_pair(folder / "in")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "compare.yaml").write_text(COMPARISON)
    commands = {**DO_WITHOUT, **{name: words for name, (_, *words) in NEEDS.items()}}
    return run(folder, EXTRAS, commands)


@pytest.mark.parametrize("command", NEEDS)
def test_what_is_needed_is_said_in_one_line(results, command):
    code, out, err = results[command]
    assert code == 2
    assert out == "" or command == "self-test"  # the self-test first prints what works
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert NEEDS[command][0] in err
    assert "pip install" in err


@pytest.mark.parametrize("command", DO_WITHOUT)
def test_the_base_installation_is_enough(results, command):
    code, out, err = results[command]
    assert (code, err) == (0, "")
    assert out


def test_a_gate_needs_neither_torch_nor_scipy(tmp_path):
    pair = write_pair(tmp_path)
    project_adapter(
        pair.adapter, aligned=pair.aligned, base=pair.base, output=tmp_path / "out" / "adapter", select="all"
    )
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "subject: adapter\ncriteria: {all: {source: project, at_least: 1}, margin: {source: margin, at_most: 1}}\n"
    )
    command = {"gate": ["gate", str(policy), str(tmp_path / "out")]}
    (result,) = run(tmp_path, [*EXTRAS, "scipy"], command).values()
    assert result[0] == 1, result
    assert "all: 1, at least 1: passes [6 of 6 modules projected]" in result[1]
    assert "margin.json: cannot be read: No such file" in result[1]
    (result,) = run(tmp_path, ["yaml"], command).values()
    assert (result[0], result[2].partition(": pip install")[0]) == (2, "error: gate needs pyyaml")


def test_a_comparison_of_the_demo_needs_more_than_the_demo(tmp_path):
    (result,) = run(tmp_path, ["trl"], {"demo": ["demo", "--train", "--output", "o"]}).values()
    assert result[0] == 2
    assert "demo --train needs trl: " in result[2] or "the demo's model comes from the package" in result[2]
    assert not (tmp_path / "o").exists()
