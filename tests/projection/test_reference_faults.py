"""The known bugs of the original research code, with a test for the absence of each."""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, adapt, assert_projected, project, rewrite, save, weights
from plain_pair import contents, write_pair
from safetensors.torch import load_file, save_file

from safelora_fast import project_adapter


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A Qwen2 pair: its 1-D biases have names that contain the modules' names."""
    folder = tmp_path_factory.mktemp("qwen")
    family = FAMILIES["qwen2"]
    aligned, base = family.make(1), family.make(2)
    folders = save(aligned, folder / "aligned"), save(base, folder / "base")
    base_weights, adapted = weights(adapt(base, **family.target)), adapt(aligned, **family.target)
    return folder, folders, save(adapted, folder / "adapter"), adapted, base_weights


def test_pairs_by_name_not_by_position(qwen, tmp_path):
    """The base's tensors are in reverse order, and one of the adapter's modules is removed."""
    _, (aligned, base), adapter, _, _ = qwen
    turned = tmp_path / "turned"
    turned.mkdir()
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors, reverse=True)
    save_file({f"model.{index:03d}": torch.zeros(1) for index in range(3)}, turned / "model-1.safetensors")
    save_file({name: tensors[name] for name in names[: len(names) // 2]}, turned / "model-2.safetensors")
    save_file({name: tensors[name] for name in names[len(names) // 2 :]}, turned / "model-3.safetensors")
    (turned / "config.json").write_bytes((base / "config.json").read_bytes())
    fewer = rewrite(
        adapter,
        tmp_path / "fewer",
        lambda state: {key: value for key, value in state.items() if "layers.0.self_attn.k_proj" not in key},
        file="adapter_model.safetensors",
    )
    whole = project_adapter(adapter, aligned=aligned, base=base, output=tmp_path / "whole", select="all")
    part = project_adapter(fewer, aligned=aligned, base=turned, output=tmp_path / "part", select="all")
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "part"))
    assert len(found) == len(expected) - 2
    assert all(torch.equal(found[key], expected[key]) for key in found)
    cosines = {module.name: module.cosine for module in whole.adapters[0].modules}
    assert all(module.cosine == cosines[module.name] for module in part.adapters[0].modules)


def test_names_are_not_matched_by_substring(qwen, tmp_path):
    """The name q_proj.bias contains q_proj, and layers.10 contains layers.1."""
    _, folders, adapter, adapted, base_weights = qwen
    (result,) = project([adapter], *folders, tmp_path)
    for module in result.plan.modules:
        for source in module.sources:
            assert source.aligned == source.base == f"{module.name}.weight"
    family = FAMILIES["llama"]
    aligned, base = family.make(1, num_hidden_layers=11), family.make(2, num_hidden_layers=11)
    pair = save(aligned, tmp_path / "aligned"), save(base, tmp_path / "base")
    one = {"target_modules": ["layers.1.self_attn.q_proj"]}
    base_weights, adapted = weights(adapt(base, **one)), adapt(aligned, **one)
    (result,) = project([save(adapted, tmp_path / "adapter")], *pair, tmp_path / "deep")
    assert [module.name for module in result.plan.modules] == ["model.layers.1.self_attn.q_proj"]
    assert_projected(result, adapted, base_weights)


def test_a_and_b_are_told_apart_by_their_keys(tmp_path):
    """With m = n = r, the matrices A, B and C·B are all square."""
    family = FAMILIES["llama"]
    aligned, base = family.make(1), family.make(2)
    folders = save(aligned, tmp_path / "aligned"), save(base, tmp_path / "base")
    config = {"r": 32, "target_modules": ["q_proj"]}
    base_weights, adapted = weights(adapt(base, **config)), adapt(aligned, **config)
    adapter = save(adapted, tmp_path / "adapter")
    shapes = {tuple(tensor.shape) for tensor in load_file(adapter / "adapter_model.safetensors").values()}
    assert shapes == {(32, 32)}
    (result,) = project([adapter], *folders, tmp_path / "out")
    before, after = (load_file(place / "adapter_model.safetensors") for place in (adapter, result.folder))
    assert all(torch.equal(before[key], after[key]) for key in before if "lora_A" in key)
    assert_projected(result, adapted, base_weights)


def test_no_dense_matrix_and_no_whole_model_in_memory(tmp_path):
    """The memory limit is too small for C of the widest module (200 MB in float32) and for either model (400 MB)."""
    pair = write_pair(tmp_path, scale=300, layers=1)
    size = sum(path.stat().st_size for path in pair.aligned.glob("*.safetensors"))
    assert size > 400e6
    program = (
        "import re, sys\n"
        "from safelora_fast.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    limit = resource.RLIMIT_DATA
    done = subprocess.run(
        [sys.executable, "-c", program, *pair.command("--quiet", "--select", "all", "--threads", "2")],
        capture_output=True, text=True, check=True, preexec_fn=lambda: resource.setrlimit(limit, (230_000_000,) * 2),
    )  # fmt: skip
    assert (pair.output / "adapter_model.safetensors").exists(), done.stderr
    anonymous = int(done.stdout.splitlines()[0]) * 1024
    assert anonymous < 150e6


def test_any_adapter_name(qwen, tmp_path):
    """PEFT writes an adapter with another name than "default" to a subfolder."""
    _folder, (aligned, base), adapter, _, _ = qwen
    adapted = adapt(FAMILIES["qwen2"].make(1), name="narrow", **FAMILIES["qwen2"].target)
    adapted.save_pretrained(tmp_path / "saved")
    for name, place in (("default", adapter), ("narrow", tmp_path / "saved" / "narrow")):
        project_adapter(place, aligned=aligned, base=base, output=tmp_path / "out" / name, select="all")
    one, other = (load_file(tmp_path / "out" / name / "adapter_model.safetensors") for name in ("default", "narrow"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_input_is_not_overwritten(qwen, tmp_path):
    folder, (aligned, base), adapter, _, _ = qwen
    before = {name: hashlib.sha256(content).hexdigest() for name, content in contents(folder).items()}
    project_adapter(adapter, aligned=aligned, base=base, output=tmp_path / "out", select="all")
    assert {name: hashlib.sha256(content).hexdigest() for name, content in contents(folder).items()} == before
