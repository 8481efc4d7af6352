"""Several machines read a share of V each; what one joins has the bytes that a single machine writes."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import call
from plain_pair import contents, write_adapter, write_pair
from safetensors.torch import load_file, save_file

from safelora_fast.projection.part_file import FILE

__all__ = ["call"]
SETTINGS = [
    ["--threshold", "0.7"],
    ["--select", "number", "--num-layers", "3"],
    ["--select", "all", "--operator", "orthogonal", "--rank", "3"],
    ["--select", "number", "--num-layers", "2", "--operator", "attenuate", "--rank", "3", "--keep", "0.25"],
]


@pytest.fixture
def pair(tmp_path):
    made = write_pair(tmp_path / "in", layers=3)
    path = made.adapter / "adapter_model.safetensors"
    kinds = [torch.bfloat16, torch.float16, torch.float32]
    factors = enumerate(load_file(path).items())
    tensors = {key: tensor.to(kinds[number % 3]) for number, (key, tensor) in factors}
    save_file(tensors, path, {"format": "pt"})
    return made


def without_times(folder):
    files = contents(folder)
    reports = [name for name in files if name.endswith("safelora_report.json")]
    for name in reports:
        report = json.loads(files[name])
        files[name] = {key: value for key, value in report.items() if key not in {"seconds", "bytes_read"}}
    assert reports
    return files


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_joined_parts_are_one_machines_output(pair, call, tmp_path, settings, count):
    """With more machines than modules, some parts are empty."""
    assert call(*pair.command(*settings)).code == 0
    parts, joined = tmp_path / "parts", tmp_path / "joined" / "safe"
    read = 0
    for index in range(count):
        words = ["--modules-shard", f"{index}/{count}", "--output", parts]
        code, out, err = call(*pair.command(*words, *settings, output=False))
        assert (code, err) == (0, "")
        assert out == f"written to {parts}/part-{index}-of-{count}.safetensors\n"
        read += len(load_file(parts / f"part-{index}-of-{count}.safetensors"))
    assert read > 0
    assert call(*pair.command("--join", parts, "--output", joined, *settings, output=False)).code == 0
    assert without_times(joined) == without_times(pair.output)


def test_several_adapters(pair, call, tmp_path):
    other = write_adapter(tmp_path / "in" / "other", 8, layers=2, rank=2)
    words = ["--aligned", pair.aligned, "--base", pair.base, "--select", "number", "--num-layers", "4"]
    assert call("project", pair.adapter, other, *words, "--output", pair.output).code == 0
    for index in range(3):
        shard = ["--modules-shard", f"{index}/3", "--output", tmp_path / "parts"]
        assert call("project", pair.adapter, other, *words, *shard).code == 0
    joined = tmp_path / "joined"
    assert call("project", pair.adapter, other, *words, "--join", tmp_path / "parts", "--output", joined).code == 0
    assert without_times(joined) == without_times(pair.output)


def test_parts_that_do_not_belong_together(pair, call, tmp_path):
    parts = tmp_path / "parts"

    def part(index, *settings):
        return call(*pair.command("--modules-shard", f"{index}/2", "--output", parts, *settings, output=False)).code

    def joined(*settings):
        code, _, err = call(*pair.command("--join", parts, *settings))
        assert (code, err.count("\n"), pair.output.exists()) == (2, 1, False)
        return err

    assert "holds no part-I-of-N.safetensors" in joined()
    assert part(0) == 0
    assert part(0) == 2  # exists already
    assert "the parts lack 1/2; make it with --modules-shard" in joined()
    assert part(1, "--select", "all") == 0
    assert "(settings.select was 'all', is 'threshold'; settings.threshold was None, is 0.5)" in joined()
    assert part(1, "--overwrite") == 0
    path = pair.adapter / "adapter_model.safetensors"
    save_file({key: -tensor for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert "was made from something else (adapter was '" in joined()
    (parts / "part-0-of-2.safetensors").write_bytes(b"\0" * 64)
    assert "part of a projection cannot be read" in joined()


HOSTILE = {
    "a huge count": (lambda document, _: document.update(count=2**62), "the parts lack 1/4611686018427387904"),
    "no metrics": (lambda document, _: document["modules"][0].update(factors=[3]), "cannot be read"),
    "rank of text": (lambda document, _: document["modules"][0].update(rank="x"), "rank must be a whole number"),
    "other factors": (lambda document, _: document["modules"][0].update(factors=[]), "cannot be read"),
    "no tensor": (lambda _, tensors: tensors.clear(), "is damaged"),
    "a wrong dtype": (lambda document, _: document["modules"][0]["factors"][0].update(B="I8"), "is damaged"),
    "a wrong shape": (lambda _, tensors: tensors.update({name: tensor[:2] for name, tensor in tensors.items()}), "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_part_is_refused_in_one_line(pair, call, tmp_path, damage, message):
    words = ["--modules-shard", "0/1", "--output", tmp_path / "parts", "--select", "all"]
    code, out, _ = call(*pair.command(*words, "--json", output=False))
    path = tmp_path / "parts" / "part-0-of-1.safetensors"
    assert (code, json.loads(out)) == (0, {"part": str(path), "shard": "0/1"})
    with FILE.opened(path) as (document, file):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    damage(document, tensors)
    FILE.save(path, tensors, document)
    code, _, err = call(*pair.command("--join", tmp_path / "parts", "--select", "all"))
    assert (code, err.count("\n"), pair.output.exists()) == (2, 1, False)
    assert message in err


def test_parts_of_two_numbers_are_not_joined(pair, call, tmp_path):
    for shard in ("0/1", "0/2"):
        assert call(*pair.command("--modules-shard", shard, "--output", tmp_path / "parts", output=False)).code == 0
    code, _, err = call(*pair.command("--join", tmp_path / "parts"))
    assert (code, "is one of 1 parts, but" in err) == (2, True)


@pytest.mark.parametrize("words", [["--dry-run"], ["--join", "parts"], ["--plot", "a.png"]], ids=" ".join)
def test_a_part_is_refused_beside_options_that_it_does_not_have(pair, call, words):
    code, _, err = call(*pair.command("--modules-shard", "0/2", *words))
    assert (code, pair.output.exists()) == (2, False)
    assert "cannot be combined with --join, --dry-run, and --plot" in err


def test_parts_are_not_joined_with_a_subspace(pair, call, tmp_path):
    words = ["project", pair.adapter, "--subspace", tmp_path / "x", "--join", tmp_path, "--output", pair.output]
    code, _, err = call(*words)
    assert (code, "--join needs both models" in err) == (2, True)
