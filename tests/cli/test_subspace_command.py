"""`safelora-fast subspace build` and `show`: what they print, write and reject."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from plain_pair import contents, module_names, run, start, write_pair
from safetensors.numpy import load_file, save_file

from safelora_fast.subspace.safe_subspace import SafeSubspace

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def words(pair, tmp_path):
    """Return the arguments of `subspace build`."""

    def make(*others, output=tmp_path / "out" / "safe.safetensors"):
        return ["subspace", "build", "--aligned", pair.aligned, "--base", pair.base, "--output", output, *others]

    return make


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "safe.safetensors"


def test_build_writes_what_the_function_builds(pair, call, words, output):
    code, out, err = call(*words("--rank", "3"))
    assert (code, err) == (0, "")
    loaded, built = SafeSubspace.load(output), SafeSubspace.build(aligned=pair.aligned, base=pair.base, rank=3)
    assert loaded.to_dict() == built.to_dict()
    assert all(
        np.array_equal(loaded.modules[name].left_vectors, built.modules[name].left_vectors) for name in module_names()
    )
    assert [path.name for path in output.parent.iterdir()] == ["safe.safetensors"]
    assert str(output) in out.replace("\n", "")
    for ending in ("q_proj", "v_proj", "down_proj"):
        energies = [module.energy for name, module in built.modules.items() if name.endswith(ending)]
        (line,) = (line.split() for line in out.splitlines() if line.startswith(f"{ending} "))
        assert line[1:3] == ["2", "3"]
        assert [float(value) for value in line[3:]] == pytest.approx(
            [min(energies), sum(energies) / 2, max(energies)], abs=6e-4
        )


def test_energy_modules_and_seed(call, words, output):
    assert call(*words("--energy", "0.9", "--modules", "q_proj, v_proj", "--seed", "3", "--threads", "2")).code == 0
    subspace = SafeSubspace.load(output)
    assert set(subspace.modules) == {name for name in module_names() if not name.endswith("down_proj")}
    assert all(module.energy >= 0.9 - 1e-6 for module in subspace.modules.values())
    assert (subspace.settings["energy"], subspace.settings["seed"]) == (0.9, 3)
    assert call(*words("--modules", "q_proj", "--modules", "down_proj", "--overwrite")).code == 0
    assert len(SafeSubspace.load(output).modules) == 4
    assert SafeSubspace.load(output).settings["rank"] == 64


def test_on_a_device(pair, call, words, output):
    code, out, err = call(*words("--rank", "3", "--device", "cpu"))
    assert (code, err) == (0, "")
    assert str(output) in out.replace("\n", "")
    loaded = SafeSubspace.load(output)
    built = SafeSubspace.build(aligned=pair.aligned, base=pair.base, rank=3, device="cpu")
    assert loaded.to_dict() == built.to_dict()
    assert loaded.settings["device"] == "cpu"
    assert "device cpu" in call("subspace", "show", output).out


def test_show(pair, call, words, output):
    assert call(*words("--rank", "3")).code == 0
    code, out, err = call("subspace", "show", output)
    assert (code, err) == (0, "")
    assert f"aligned  {pair.aligned}" in out
    assert f"base     {pair.base}" in out
    assert "rank 3" in out
    for name, module in SafeSubspace.load(output).modules.items():
        (line,) = (line.split() for line in out.splitlines() if line.startswith(name))
        assert line[1:4] == [f"{len(module.left_vectors)}×{module.columns}", "3", f"{module.energy:.4g}"]


def test_lines_fit_into_eighty_columns(words, output):
    assert run(words("--rank", "3"), env={"COLUMNS": "80"})[0] == 0
    code, out, _ = run(["subspace", "show", output], env={"COLUMNS": "80"})
    assert code == 0
    table = out.splitlines()[3:]
    assert len(table) == 1 + len(module_names())
    assert all(len(line) <= 80 and "…" not in line for line in table)


def test_json_alone_on_standard_output(call, words, output):
    code, out, err = call(*words("--rank", "3", "--json"))
    assert (code, err) == (0, "")
    built = json.loads(out)
    assert built == SafeSubspace.load(output).to_dict()
    assert built == json.loads(call("subspace", "show", output, "--json").out)
    assert {module["name"] for module in built["modules"]} == set(module_names())
    assert all(0 < module["energy"] < 1 for module in built["modules"])


def test_quiet(call, words, output):
    assert call(*words("--quiet")) == (0, "", "")
    assert output.exists()


def test_a_module_without_difference_is_reported(pair, call, words, output):
    aligned, base = load_file(pair.shard("aligned")), load_file(pair.shard("base"))
    aligned[f"{Q}.weight"] = base[f"{Q}.weight"]
    save_file(aligned, pair.shard("aligned"))
    code, out, err = call(*words("--rank", "3"))
    assert code == 0
    assert err.startswith(f"warning: V is zero in {Q}: ")
    assert "q_proj" in out
    code, out, err = call("subspace", "show", output, "--json")
    (found,) = (module for module in json.loads(out)["modules"] if module["name"] == Q)
    assert found == {
        "name": Q, "rows": 24, "columns": 16, "rank": 0, "energy": None, "v_norm": 0.0, "spectral_norm": 0.0
    }  # fmt: skip


def nan_weight(pair, _):
    tensors = load_file(pair.shard("base"))
    tensors[f"{Q}.weight"][3, 5] = np.nan
    save_file(tensors, pair.shard("base"))


def output_exists(_, output):
    output.parent.mkdir()
    output.write_text("mine")


def output_is_a_folder(_, output):
    output.mkdir(parents=True)


def output_below_a_file(_, output):
    output.parent.write_text("mine")


CASES = [
    (nan_weight, "row 3, column 5"),
    (output_exists, "--overwrite"),
    (output_is_a_folder, "is a folder"),
    (output_below_a_file, "is not a folder"),
]


@pytest.mark.parametrize(("spoil", "message"), CASES, ids=[case[0].__name__ for case in CASES])
def test_one_line_and_nothing_written(pair, call, words, output, tmp_path, spoil, message):
    spoil(pair, output)
    before = contents(tmp_path)
    code, out, err = call(*words())
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.rglob(".*")] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--energy", "nan"], "energy"),
        (["--modules", ""], "modules"),
        (["--device", "tpu"], "device must be one of cpu, cuda, xpu, with a number if need be, not 'tpu'"),
    ],
    ids=" ".join,
)
def test_settings_that_make_no_sense(call, words, output, options, message):
    code, out, err = call(*words(*options))
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not output.exists()


def test_the_output_may_not_lie_in_an_input(pair, call, words):
    before = contents(pair.aligned)
    for output in (pair.aligned / "safe.safetensors", pair.shard("aligned")):
        code, _, err = call(*words("--overwrite", output=output))
        assert code == 2
        assert "must not be, or lie in, the input" in err
    assert contents(pair.aligned) == before


def test_show_refuses_other_files(pair, call, tmp_path):
    (tmp_path / "text").write_text("hello")
    for file, message in (
        (tmp_path / "none", "cannot be read"),
        (tmp_path / "text", "cannot be read"),
        (tmp_path, "cannot be read"),
        (pair.shard("base"), "not a subspace file"),
    ):
        code, out, err = call("subspace", "show", file)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1


def test_no_torch_is_imported(tmp_path):
    pair = write_pair(tmp_path / "in")
    program = (
        "import sys; from safelora_fast.cli import main\n"
        "try: main()\n"
        "finally: print(*sorted({'torch', 'transformers', 'peft', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    file = tmp_path / "safe.safetensors"
    build = ["subspace", "build", "--aligned", pair.aligned, "--base", pair.base, "--output", file, "--quiet"]
    for words in (build, ["subspace", "show", file, "--json"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == ""


def streams(pid):
    """Return whether the process has started its worker thread."""
    try:
        return any(path.read_text().startswith("safelora-fast") for path in Path(f"/proc/{pid}/task").glob("*/comm"))
    except OSError:  # a thread that has just ended
        return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(tmp_path, number, code):
    pair = write_pair(tmp_path, scale=40, layers=8)
    output = tmp_path / "out" / "safe.safetensors"
    build = ["subspace", "build", "--aligned", pair.aligned, "--base", pair.base, "--output", output]
    process = start([*build, "--energy", "0.99", "--threads", "1"])
    end = time.monotonic() + 60
    while not streams(process.pid):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert "Traceback" not in err
    assert not output.parent.exists()


def test_a_pipe_that_closes(tmp_path, words):
    assert run(words("--quiet"))[0] == 0
    show = f"{sys.executable} -m safelora_fast subspace show {tmp_path / 'out' / 'safe.safetensors'} --json | head -n 1"
    done = subprocess.run(show, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout == "{\n"
    assert done.stderr == ""
