"""Bad input gives one line on standard error and exit code 2, and nothing is written."""

from __future__ import annotations

import json
import os
import resource
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
from plain_pair import contents, run, write_adapter, write_model
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

Q = "model.layers.0.self_attn.q_proj"


def edit_header(path: Path, change) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def truncate(pair):
    path = pair.shard("base", 2)
    os.truncate(path, path.stat().st_size - 100)


def cut_in_the_header(pair):
    os.truncate(pair.shard("base"), 40)


def long_header(pair):
    path = pair.shard("aligned")
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def lying_offsets(pair):
    edit_header(pair.shard("base"), lambda header: header[f"{Q}.weight"].update(data_offsets=[0, 10**9]))


def lying_shape(pair):
    edit_header(pair.shard("base"), lambda header: header[f"{Q}.weight"].update(shape=[24, 17]))


def no_json(pair):
    path = pair.shard("base")
    path.write_bytes(struct.pack("<Q", 16) + b"this is no JSON!" + path.read_bytes()[24:])


def missing_shard(pair):
    pair.shard("base", 2).unlink()


def escaping_index(pair):
    index = pair.base / "model.safetensors.index.json"
    edit_json(index, lambda content: content["weight_map"].update({f"{Q}.weight": "../../etc/passwd"}))


def broken_promise(pair):
    edit_tensors(pair.shard("base"), lambda tensors: tensors.pop(f"{Q}.weight"))


def nan_weight(pair):
    edit_tensors(pair.shard("aligned"), lambda tensors: tensors[f"{Q}.weight"].__setitem__((3, 5), np.nan))


def infinite_weight(pair):
    edit_tensors(pair.shard("base", 2), lambda t: t["model.layers.1.mlp.down_proj.weight"].__setitem__((1, 2), np.inf))


def nan_factor(pair):
    key = f"base_model.model.{Q}.lora_B.weight"
    edit_tensors(pair.adapter / "adapter_model.safetensors", lambda tensors: tensors[key].__setitem__((7, 1), np.nan))


def other_shapes(pair):
    key = f"base_model.model.{Q}.lora_B.weight"
    path = pair.adapter / "adapter_model.safetensors"
    edit_tensors(path, lambda tensors: tensors.update({key: np.ones((25, 4), np.float32)}))


def other_base_shape(pair):
    edit_tensors(pair.shard("base"), lambda tensors: tensors.update({f"{Q}.weight": np.ones((24, 18), np.float32)}))


def missing_module(pair):
    edit_json(pair.aligned / "model.safetensors.index.json", lambda content: content["weight_map"].pop(f"{Q}.weight"))


def integers(pair):
    edit_tensors(pair.shard("aligned"), lambda tensors: tensors.update({f"{Q}.weight": np.ones((24, 16), np.int8)}))


def same_model(pair):
    for file, content in contents(pair.aligned).items():
        (pair.base / file).write_bytes(content)


def pickled_model(pair):
    for path in pair.base.iterdir():
        path.unlink()
    (pair.base / "pytorch_model.bin").write_bytes(b"PK")


def pickled_adapter(pair):
    (pair.adapter / "adapter_model.safetensors").rename(pair.adapter / "adapter_model.bin")


def no_lora(pair):
    edit_json(pair.adapter / "adapter_config.json", lambda content: content.update(peft_type="IA3"))


def dora(pair):
    edit_json(pair.adapter / "adapter_config.json", lambda content: content.update(use_dora=True))


def broken_config(pair):
    (pair.adapter / "adapter_config.json").write_text("{")


def output_exists(pair):
    pair.output.mkdir(parents=True)
    (pair.output / "thesis.txt").write_text("mine")


def output_is_a_file(pair):
    pair.output.parent.mkdir(parents=True)
    pair.output.write_text("mine")


def output_is_a_link(pair):
    pair.output.parent.mkdir(parents=True)
    pair.output.symlink_to("elsewhere")


def output_below_a_file(pair):
    pair.output.parent.write_text("mine")


def read_only_folder(pair):
    pair.output.parent.mkdir(parents=True)
    pair.output.parent.chmod(0o555)


CASES = [
    (truncate, "model-00002-of-00002.safetensors: "),
    (cut_in_the_header, "model-00001-of-00002.safetensors: "),
    (long_header, "model-00001-of-00002.safetensors: "),
    (lying_offsets, Q),
    (lying_shape, Q),
    (no_json, "model-00001-of-00002.safetensors: "),
    (missing_shard, "model-00002-of-00002.safetensors"),
    (escaping_index, "../../etc/passwd"),
    (broken_promise, f"the index promises tensor '{Q}.weight'"),
    (nan_weight, f"{Q}.weight"),
    (infinite_weight, "model.layers.1.mlp.down_proj.weight"),
    (nan_factor, f"{Q}.lora_B.weight"),
    (other_shapes, Q),
    (other_base_shape, Q),
    (missing_module, Q),
    (integers, f"{Q}.weight"),
    (same_model, "V = aligned - base is zero"),
    (pickled_model, "to convert it, load it with transformers"),
    (pickled_adapter, "load the adapter with PEFT"),
    (no_lora, "peft_type is IA3"),
    (dora, "use_dora is set"),
    (broken_config, "adapter_config.json: is not JSON"),
    (output_exists, "--overwrite"),
    (output_is_a_file, "exists and is not a folder"),
    (output_is_a_link, "is a symbolic link to elsewhere"),
    (output_below_a_file, "is not a folder"),
    (read_only_folder, "no permission to write"),
]


@pytest.mark.parametrize(("spoil", "message"), CASES, ids=[case[0].__name__ for case in CASES])
def test_one_line_and_nothing_written(pair, call, tmp_path, spoil, message):
    if spoil is read_only_folder and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    spoil(pair)
    before = contents(tmp_path)
    code, out, err = call(*pair.command())
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.rglob(".*")] == []


OPTIONS = [
    (["--operator", "saflora"], "safelora"),
    (["--normalize", "nuclear"], "spectral"),
    (["--operator", "zero", "--normalize", "spectral"], "normalize"),
    (["--rank", "4"], "rank"),
    (["--operator", "orthogonal"], "rank or energy"),
    (["--operator", "orthogonal", "--rank", "0"], "rank must lie between 1 and"),
    (["--operator", "orthogonal", "--rank", "99999999999999999999"], "rank must lie between 1 and"),
    (["--operator", "orthogonal", "--rank", "4", "--energy", "0.5"], "one of rank and energy, not both"),
    (["--operator", "orthogonal", "--energy", "2"], "energy"),
    (["--operator", "orthogonal", "--energy", "nan"], "energy"),
    (["--threshold", "nan"], "threshold"),
    (["--threshold", "1.5"], "between -1 and 1"),
    (["--select", "number", "--threshold", "0.5"], "threshold"),
    (["--num-layers", "3"], "num_layers"),
    (["--select", "number", "--num-layers", "0"], "num_layers"),
    (["--threads", "0"], "threads"),
    (["--threads", "99999999999999999999"], "threads must lie between 1 and"),
    (["--plot", "picture.exe"], "picture.exe"),
    (["--aligned", ""], "aligned is empty"),
]


@pytest.mark.parametrize(("words", "message"), OPTIONS, ids=[" ".join(case[0]) for case in OPTIONS])
def test_settings_that_make_no_sense(pair, call, tmp_path, words, message):
    before = contents(tmp_path)
    code, out, err = call(*pair.command(*words))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err.replace("-", "_") or message in err
    assert contents(tmp_path) == before


def test_a_configuration_given_as_a_model(pair, call):
    words = ["--aligned", pair.aligned / "config.json", "--base", pair.base]
    code, _, err = call("inspect", pair.adapter, *words)
    assert code == 2
    assert err.startswith(f"error: {pair.aligned}/config.json: is neither a safetensors file nor an index")
    assert err.endswith(f"give the model's folder, {pair.aligned}\n")


def test_no_output(pair, call):
    code, _, err = call(*pair.command(output=False))
    assert code == 2
    assert "--output DIR, or pass --dry-run" in err


@pytest.mark.parametrize("place", ["adapter", "aligned"])
def test_the_output_may_not_be_an_input(pair, call, place):
    folder = getattr(pair, place)
    before = contents(folder)
    code, _, err = call(*pair.command("--overwrite", "--output", folder, output=False))
    assert code == 2
    assert "must not contain one another" in err
    assert contents(folder) == before


def test_a_full_disk(pair, tmp_path):
    """A limit on the file size simulates a disk that fills up while the adapter is written."""
    size = (pair.adapter / "adapter_model.safetensors").stat().st_size

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    code, out, err = run(pair.command(), preexec_fn=limit)
    assert (code, out) == (2, "")
    assert "the disk is full" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_room_is_seen_before_the_work(pair, call, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    code, _, err = call(*pair.command())
    assert code == 2
    assert "has 10 left" in err


def test_an_adapter_of_another_model(pair, call, tmp_path):
    """The adapter has more layers than the model. The error names the module and the nearest tensors."""
    adapter = write_adapter(tmp_path / "deep", 4, layers=3)
    code, _, err = call("project", adapter, "--aligned", pair.aligned, "--base", pair.base, "--output", pair.output)
    assert code == 2
    assert "model.layers.2." in err
    assert err.count("\n") == 1


def test_a_base_of_another_size(pair, call, tmp_path):
    other = write_model(tmp_path / "wide", 5, scale=2)
    code, _, err = call("project", pair.adapter, "--aligned", pair.aligned, "--base", other, "--output", pair.output)
    assert code == 2
    assert "base [32, 80]" in err
    assert "(and 5 more modules)" in err
    assert not pair.output.exists()


@pytest.mark.parametrize("words", [("project", "a", "--output"), ("operator-swap", "score", "x", "--model")])
def test_an_option_without_its_value_names_the_command(call, words):
    code, _, err = call(*words)
    command = " ".join(words[: 2 if words[0] == "operator-swap" else 1])
    assert (code, err) == (2, f"error: Option '{words[-1]}' requires an argument; see safelora-fast {command} --help\n")
