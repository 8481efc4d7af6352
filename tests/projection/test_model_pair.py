"""Warnings and errors for an aligned model and a base model that do not match."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_pair import module_names, run, write_adapter, write_model, write_pair
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from safelora_fast import _core, project_adapter
from safelora_fast.checkpoints.geometry import Block
from safelora_fast.checkpoints.weight_norms import MOST_VALUES, weight_norm
from safelora_fast.errors import PairingError
from safelora_fast.subspace.safe_subspace import SafeSubspace


def near(folder, other, step):
    """Copy a model and change its weights by `step` times their size."""
    shutil.copytree(folder, other)
    random = np.random.default_rng(9)
    for shard in other.glob("*.safetensors"):
        tensors = load_file(shard)
        moved = {name: tensor + step / 8 * random.standard_normal(tensor.shape) for name, tensor in tensors.items()}
        save_file({name: tensor.astype(np.float32) for name, tensor in moved.items()}, shard, {"format": "pt"})
    return other


def unrelated(folder):
    """Create an unrelated model with the same shapes."""
    write_model(folder, 2)
    random = np.random.default_rng(11)
    for shard in folder.glob("*.safetensors"):
        tensors = {name: random.standard_normal(tensor.shape) / 8 for name, tensor in load_file(shard).items()}
        save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, shard, {"format": "pt"})
    return folder


def weights_of(folder):
    tensors = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    return {name: tensors[f"{name}.weight"].astype(float) for name in module_names()}


@pytest.mark.parametrize("step", [0.001, 0.1, None], ids=["tuned", "tuned far", "unrelated"])
def test_the_ratio_of_norms(tmp_path, step):
    pair = write_pair(tmp_path)
    base = unrelated(tmp_path / "other") if step is None else near(pair.aligned, tmp_path / "near", step)
    report = project_adapter(pair.adapter, aligned=pair.aligned, base=base, output=pair.output)
    ours, theirs = weights_of(pair.aligned), weights_of(base)
    truth = {name: np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(ours[name]) for name in ours}
    (adapter,) = report.adapters
    assert {module.name: module.v_ratio for module in adapter.modules} == pytest.approx(truth, rel=1e-6)
    assert adapter.v_ratio == pytest.approx(np.median(list(truth.values())), rel=1e-6)
    stored = json.loads((pair.output / "safelora_report.json").read_text())
    assert stored["adapters"][0]["median_v_ratio"] == adapter.v_ratio
    assert f"| median ‖V‖/‖W_aligned‖ | {adapter.v_ratio:.4g} |" in (pair.output / "README.md").read_text()
    warned = [warning for warning in report.warnings if "as unrelated models do" in warning]
    assert len(warned) == (step is None)


def test_the_command_shows_the_ratio(tmp_path):
    pair = write_pair(tmp_path)
    pair = replace(pair, base=unrelated(tmp_path / "other"))
    code, out, err = run(pair.command("--dry-run", output=False))
    assert code == 0
    assert "median ‖V‖/‖W_aligned‖: 1.4" in out
    assert "is base the model that aligned was made from?" in " ".join(err.split())


def test_a_subspace_of_unrelated_models(tmp_path):
    pair = write_pair(tmp_path)
    pair = replace(pair, base=unrelated(tmp_path / "other"))
    words = ["--aligned", pair.aligned, "--base", pair.base, "--output", tmp_path / "s", "--rank", 2]
    code, _, err = run(["subspace", "build", *words])
    assert code == 0
    assert "as unrelated models do" in " ".join(err.split())
    ours, theirs = weights_of(pair.aligned), weights_of(pair.base)
    ratios = [np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(ours[name]) for name in ours]
    found = SafeSubspace.load(tmp_path / "s").settings["median_v_ratio"]
    assert found == pytest.approx(np.median(ratios), rel=1e-3)  # stored with four digits


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", [(24, 16), (3000, 40), (40, 3000)])
def test_norms_from_some_rows(tmp_path, shape, dtype):
    torch.manual_seed(0)
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    weight = torch.randn(shape).to(kinds[dtype])
    save_torch({"first": torch.ones(3), "w": weight}, tmp_path / "w.safetensors")
    file = _core.SafetensorsFile(str(tmp_path / "w.safetensors"))
    begin = file.tensors["w"][2]
    whole = Block("w", file, dtype, begin, 0, *shape)
    truth = float(weight.double().norm())
    # The norm of k normal values has a relative error of 1/sqrt(2k); here 16 rows or more, five sigma.
    few = weight.numel() <= MOST_VALUES
    assert weight_norm([whole]) == pytest.approx(truth, rel=1e-9 if few else 5 / (2 * 16 * 40) ** 0.5)
    halves = [whole.cut(0, shape[0] // 2), whole.cut(shape[0] // 2, shape[0] - shape[0] // 2)]
    assert weight_norm(halves) == pytest.approx(truth, rel=1e-9 if few else 5 / (2 * 16 * 40) ** 0.5)


def test_models_of_two_types(tmp_path):
    pair = write_pair(tmp_path)
    for kind, told in {"mistral": 1, "llama": 0, "llama_text": 0, None: 0}.items():
        (pair.base / "config.json").write_text(json.dumps({"model_type": kind}))
        report = project_adapter(pair.adapter, aligned=pair.aligned, base=pair.base, output=None)
        assert sum("different types (llama and mistral)" in warning for warning in report.warnings) == told


def test_one_model_twice_is_refused_before_it_is_read(tmp_path):
    pair = write_pair(tmp_path)
    (tmp_path / "link").symlink_to(pair.aligned)
    for shard in pair.aligned.glob("*.safetensors"):
        content = shard.read_bytes()
        shard.write_bytes(content[:-4] + b"\xff\xff\xff\xff")  # a NaN that reading would detect
    for base in (pair.aligned, tmp_path / "link"):
        with pytest.raises(PairingError, match="aligned and base hold the same weights"):
            project_adapter(pair.adapter, aligned=pair.aligned, base=base, output=None)


def test_the_same_weights_in_some_modules(tmp_path):
    pair = write_pair(tmp_path)
    shutil.copy(pair.shard("aligned"), pair.shard("base"))
    report = project_adapter(pair.adapter, aligned=pair.aligned, base=pair.base, output=None)
    assert any("hold the same weights in 3 of 6 modules" in warning for warning in report.warnings)


def test_swapped_models(tmp_path):
    aligned, base = write_model(tmp_path / "chat", 1), write_model(tmp_path / "raw", 2)
    adapter = write_adapter(tmp_path / "adapter", 3)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "some/chat"}))
    right = project_adapter(adapter, aligned=aligned, base=base, output=None).warnings
    swapped = project_adapter(adapter, aligned=base, base=aligned, output=None).warnings
    assert not any("trained on" in warning for warning in right)
    assert any("trained on some/chat, which is given as base: are the two models swapped?" in line for line in swapped)
