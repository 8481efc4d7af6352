"""Adapters projected with the vectors of a subspace file alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import call
from plain_pair import module_names, write_adapter, write_pair
from safetensors.torch import load_file, save_file

from safelora_fast import SafeSubspace, project_adapter, project_fleet
from safelora_fast.errors import CheckpointError, PairingError, SettingsError

__all__ = ["call"]
RANK = 6


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path / "in")


@pytest.fixture
def subspace(pair):
    return SafeSubspace.build(aligned=pair.aligned, base=pair.base, rank=RANK)


def factors(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        name: tuple(tensors[f"base_model.model.{name}.lora_{side}.weight"].double().numpy() for side in "BA")
        for name in module_names()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 2])
def test_factors_and_metrics_against_float64(pair, subspace, tmp_path, dtype, rank):
    path = pair.adapter / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    output = tmp_path / "safe"
    options = {"operator": "orthogonal", "select": "all", "rank": rank}
    report = project_adapter(pair.adapter, subspace=subspace, output=output, **options)
    (adapter,) = report.adapters
    before, after = factors(pair.adapter), factors(output)
    assert [module.name for module in adapter.modules] == list(subspace.modules)
    for module in adapter.modules:
        known = subspace.modules[module.name]
        vectors = known.left_vectors[:, : rank or RANK].astype(np.float64)
        values = known.singular_values[: rank or RANK].astype(np.float64)
        lora_b, lora_a = before[module.name]
        expected = vectors @ (vectors.T @ lora_b)
        rounded = torch.from_numpy(expected).to(dtype).double().numpy()
        step = np.abs(expected).max() * 2.0 ** -{torch.float32: 20, torch.float16: 10, torch.bfloat16: 7}[dtype]
        assert np.abs(after[module.name][0] - rounded).max() <= step
        assert np.mean(after[module.name][0] == rounded) > (0 if dtype is torch.float32 else 0.95)
        assert np.array_equal(after[module.name][1], lora_a)
        update, cut = lora_b @ lora_a, vectors @ (values[:, None] ** 2 * (vectors.T @ lora_b)) @ lora_a
        cosine = (update * cut).sum() / np.linalg.norm(update) / np.linalg.norm(cut)
        found = (module.cosine, module.b_norm, module.b_norm_after, module.update_norm, module.update_norm_after)
        norms = [np.linalg.norm(one) for one in (lora_b, expected, update, expected @ lora_a)]
        assert found == pytest.approx((cosine, *norms), rel=1e-5)
        assert (module.projected, module.v_norm, module.v_rank) == (True, known.v_norm, rank or RANK)
        assert module.gain == pytest.approx(norms[1] / norms[0], rel=1e-5)
    assert sum("cosines are those of C cut to the subspace's vectors" in warning for warning in report.warnings) == 1


def test_the_file_gives_what_the_checkpoints_give(pair, subspace, tmp_path, call):
    """Without the checkpoints, from the command line; bytes agree to the accuracy of U_k."""
    words = ["--operator", "orthogonal", "--select", "all"]
    assert call(*pair.command(*words, "--rank", RANK)).code == 0
    subspace.save(tmp_path / "safe.safetensors")
    shutil.rmtree(pair.aligned)
    shutil.rmtree(pair.base)
    out = tmp_path / "vectors"
    words = ["project", pair.adapter, "--subspace", tmp_path / "safe.safetensors", *words, "--output", out]
    assert call(*words, "--quiet").code == 0
    ours, theirs = factors(out), factors(pair.output)
    for name, (lora_b, _) in ours.items():
        assert np.linalg.norm(lora_b - theirs[name][0]) <= 1e-4 * np.linalg.norm(lora_b)
    published = json.loads((out / "safelora_report.json").read_text())
    assert published["aligned"]["source"] == "aligned"
    assert "| aligned model | `aligned` |" in (out / "README.md").read_text()
    code, _, err = call(*words, "--overwrite", "--aligned", pair.aligned)
    assert (code, "a subspace replaces both checkpoints" in err) == (2, True)


def test_a_fleet_needs_no_checkpoints(pair, subspace, tmp_path):
    for seed in range(3):
        write_adapter(tmp_path / "fleet" / f"a{seed}", seed)
    options = {"subspace": subspace, "operator": "orthogonal", "select": "all"}
    report = project_fleet(tmp_path / "fleet", output=tmp_path / "out", batch=2, **options)
    assert (report.projected, report.passes, report.failed) == (3, 2, {})
    alone = project_adapter(tmp_path / "fleet" / "a1", output=tmp_path / "alone", **options)
    assert len(alone.adapters[0].projected) == len(module_names())
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / "a1" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert project_fleet(tmp_path / "fleet", output=tmp_path / "out", **options).skipped == 3
    other = SafeSubspace.build(aligned=pair.aligned, base=pair.base, rank=RANK, seed=1)
    report = project_fleet(tmp_path / "fleet", output=tmp_path / "out", **{**options, "subspace": other})
    assert all("pair.subspace was '" in error for error in report.failed.values())
    assert len(report.failed) == 3


REFUSED = [
    ({}, "operator safelora needs both checkpoints"),
    ({"operator": "orthogonal"}, "a subspace cannot select by the paper's cosine"),
    ({"operator": "orthogonal", "select": "all", "rank": 7}, "rank 7 is more than the subspace has, 6"),
    ({"operator": "orthogonal", "select": "all", "energy": 0.999}, "energy 0.999 is more than the subspace keeps of "),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_vectors_cannot_do_is_refused(pair, subspace, options, message):
    with pytest.raises(SettingsError) as refused:
        project_adapter(pair.adapter, subspace=subspace, output=pair.output, **options)
    assert message in str(refused.value)
    assert not pair.output.exists()


def test_energy_chooses_the_rank(pair, subspace):
    options = {"operator": "orthogonal", "select": "all", "energy": 0.4, "output": None}
    for module in project_adapter(pair.adapter, subspace=subspace, **options).adapters[0].modules:
        shares = np.cumsum((subspace.modules[module.name].singular_values / module.v_norm) ** 2)
        assert module.v_rank == 1 + np.searchsorted(shares, 0.4)
        assert module.v_energy == pytest.approx(shares[module.v_rank - 1])


def test_modules_that_do_not_fit(pair, subspace):
    name, *others = subspace.modules
    options = {"operator": "orthogonal", "select": "all", "output": None}
    lacking = replace(subspace, modules={one: subspace.modules[one] for one in others})
    with pytest.raises(PairingError, match=f"module {name} is not in the subspace.*--exclude"):
        project_adapter(pair.adapter, subspace=lacking, **options)
    wide = replace(subspace, modules={**subspace.modules, name: replace(subspace.modules[name], columns=17)})
    with pytest.raises(PairingError, match=r"update is \[16, 40\], but V of .* is \[16, 17\]"):
        project_adapter(pair.adapter, subspace=wide, **options)
    path = pair.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.{name}.lora_B.weight"][3, 1] = np.inf
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN or Inf") as bad:
        project_adapter(pair.adapter, subspace=subspace, **options)
    assert str(bad.value).startswith(str(path))
