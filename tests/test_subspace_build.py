"""SafeSubspace.build against the dense singular value decomposition."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from safelora_fast.errors import CheckpointError, PairingError, SettingsError
from safelora_fast.subspace import SafeSubspace

SHAPES = {"model.layers.0.self_attn.q_proj": (48, 40), "model.layers.0.mlp.down_proj": (33, 71)}


def differences(seed=0):
    """V with singular values that fall off."""
    random = np.random.default_rng(seed)
    result = {}
    for name, (rows, columns) in SHAPES.items():
        size = min(rows, columns)
        left = np.linalg.qr(random.standard_normal((rows, size)))[0]
        right = np.linalg.qr(random.standard_normal((columns, size)))[0]
        result[name] = (left * 0.8 ** np.arange(size)) @ right.T
    return result


@pytest.fixture
def checkpoints(tmp_path):
    """Folders of the aligned (two shards with an index) and the base checkpoint (one file)."""
    random = np.random.default_rng(1)
    base, aligned = {}, {}
    for name, v in differences().items():
        base[name + ".weight"] = random.standard_normal(v.shape).astype(np.float32)
        aligned[name + ".weight"] = (base[name + ".weight"] + v).astype(np.float32)
    base["lm_head.weight"] = aligned["lm_head.weight"] = np.ones((4, 4), np.float32)
    (tmp_path / "aligned").mkdir()
    (tmp_path / "base").mkdir()
    index = {}
    for number, (name, value) in enumerate(aligned.items()):
        file = f"model-{number}.safetensors"
        save_file({name: value}, tmp_path / "aligned" / file)
        index[name] = file
    (tmp_path / "aligned" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file(base, tmp_path / "base" / "model.safetensors")
    return {"aligned": tmp_path / "aligned", "base": tmp_path / "base"}


def dense(checkpoints_):
    from safetensors.numpy import load_file

    base = load_file(checkpoints_["base"] / "model.safetensors")
    aligned = {}
    for file in checkpoints_["aligned"].glob("*.safetensors"):
        aligned.update(load_file(file))
    return {name: (aligned[name + ".weight"] - base[name + ".weight"]).astype(np.float64) for name in SHAPES}


def test_against_the_dense_decomposition(checkpoints):
    subspace = SafeSubspace.build(**checkpoints, rank=6)
    assert set(subspace.modules) == set(SHAPES)
    for name, v in dense(checkpoints).items():
        left, values, _ = np.linalg.svd(v)
        module = subspace.modules[name]
        assert module.rank == 6
        assert np.allclose(module.singular_values, values[:6], rtol=1e-5)
        projector = module.left_vectors @ module.left_vectors.T
        assert np.abs(projector - left[:, :6] @ left[:, :6].T).max() < 1e-3
        assert np.abs(module.left_vectors.T @ module.left_vectors - np.eye(6)).max() < 1e-6
        assert module.v_norm == pytest.approx(np.linalg.norm(v), rel=1e-6)
        assert module.energy == pytest.approx((values[:6] ** 2).sum() / (values**2).sum(), rel=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_energy_keeps_the_fewest_vectors(checkpoints, energy):
    subspace = SafeSubspace.build(**checkpoints, energy=energy)
    for name, v in dense(checkpoints).items():
        squares = np.linalg.svd(v, compute_uv=False) ** 2
        if energy < 1:
            expected = int(np.searchsorted(np.cumsum(squares), energy * squares.sum())) + 1
            assert subspace.modules[name].rank == expected
        assert subspace.modules[name].energy >= energy - 1e-5


def test_conv1d_weights_are_stored_the_other_way(checkpoints):
    subspace = SafeSubspace.build(**checkpoints, rank=4, fan_in_fan_out=True)
    for name, v in dense(checkpoints).items():
        right = np.linalg.svd(v)[2][:4]
        module = subspace.modules[name]
        assert module.left_vectors.shape == (v.shape[1], 4)
        assert np.abs(module.left_vectors @ module.left_vectors.T - right.T @ right).max() < 1e-3


def test_the_same_seed_gives_the_same_subspace(checkpoints, tmp_path):
    for number in (1, 2):
        SafeSubspace.build(**checkpoints, rank=5, threads=number).save(tmp_path / f"{number}.safetensors")
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_a_module_without_difference_has_rank_zero(checkpoints):
    subspace = SafeSubspace.build(aligned=checkpoints["base"], base=checkpoints["base"], rank=5)
    assert {module.rank for module in subspace.modules.values()} == {0}


def test_provenance(checkpoints):
    sources = SafeSubspace.build(**checkpoints, rank=2, modules=["q_proj"]).sources
    assert sources["aligned"]["path"] == str(checkpoints["aligned"])
    file = checkpoints["base"] / "model.safetensors"
    described = sources["base"]["files"]["model.safetensors"]
    assert described["size"] == file.stat().st_size
    assert len(described["header_sha256"]) == 64


def test_refusals(checkpoints, tmp_path):
    with pytest.raises(PairingError, match="no module ends in c_attn"):
        SafeSubspace.build(**checkpoints, modules=["c_attn"])
    with pytest.raises(CheckpointError, match="no safetensors file"):
        SafeSubspace.build(aligned=tmp_path / "nowhere", base=checkpoints["base"])
    save_file({"model.layers.0.self_attn.q_proj.weight": np.ones((48, 40), np.float32)}, tmp_path / "part.safetensors")
    with pytest.raises(PairingError, match=r"layers\.0\.mlp\.down_proj is not in the base checkpoint"):
        SafeSubspace.build(aligned=checkpoints["aligned"], base=tmp_path / "part.safetensors")
    for wrong in ({"rank": 0}, {"energy": 1.5}, {"rank": 2, "energy": 0.5}):
        with pytest.raises(SettingsError, match=r"rank|energy"):
            SafeSubspace.build(**checkpoints, **wrong)
