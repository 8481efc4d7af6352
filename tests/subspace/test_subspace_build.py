"""SafeSubspace.build, by the extension and on a device, compared with the dense float64 decomposition."""

from __future__ import annotations

import json
import shutil
from functools import partial

import numpy as np
import pytest
from plain_pair import module_names, write_pair
from safetensors.numpy import load_file, save_file

from safelora_fast.checkpoints.provenance import reopen
from safelora_fast.errors import CheckpointError, OutputError, PairingError, SettingsError
from safelora_fast.subspace.safe_subspace import SafeSubspace

SHAPES = {"model.layers.0.self_attn.q_proj": (48, 40), "model.layers.0.mlp.down_proj": (33, 71)}


@pytest.fixture(params=[None, "cpu"], ids=["extension", "device"])
def build(request):
    """Build by the extension and on a torch device, here the CPU."""
    return partial(SafeSubspace.build, device=request.param)


def differences(seed=0):
    """Return V with decreasing singular values."""
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
    """Write the aligned (two shards with an index) and the base checkpoint (one file), and return their folders."""
    random = np.random.default_rng(1)
    base, aligned = {}, {}
    for name, v in differences().items():
        base[name + ".weight"] = random.standard_normal(v.shape).astype(np.float32)
        aligned[name + ".weight"] = (base[name + ".weight"] + v).astype(np.float32)
    base["lm_head.weight"] = aligned["lm_head.weight"] = np.ones((4, 4), np.float32)
    base["model.layers.0.norm.weight"] = aligned["model.layers.0.norm.weight"] = np.ones(4, np.float32)
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
    base = load_file(checkpoints_["base"] / "model.safetensors")
    aligned = {}
    for file in checkpoints_["aligned"].glob("*.safetensors"):
        aligned.update(load_file(file))
    return {name: (aligned[name + ".weight"] - base[name + ".weight"]).astype(np.float64) for name in SHAPES}


def test_against_the_dense_decomposition(build, checkpoints):
    subspace = build(**checkpoints, rank=6)
    assert set(subspace.modules) == set(SHAPES)
    for name, v in dense(checkpoints).items():
        left, values, _ = np.linalg.svd(v)
        module = subspace.modules[name]
        assert module.rank == 6
        assert np.allclose(module.singular_values, values[:6], rtol=1e-5)
        angles = np.linalg.svd(left[:, :6].T @ module.left_vectors, compute_uv=False)
        assert np.sqrt(1 - np.minimum(angles, 1) ** 2).max() < 1e-3
        assert np.abs(module.left_vectors.T @ module.left_vectors - np.eye(6)).max() < 1e-6
        assert module.v_norm == pytest.approx(np.linalg.norm(v), rel=1e-6)
        assert module.energy == pytest.approx((values[:6] ** 2).sum() / (values**2).sum(), rel=1e-5)
        assert module.spectral_norm == pytest.approx(values[0], rel=1e-5)
        assert module.columns == v.shape[1]


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_energy_keeps_the_fewest_vectors(build, checkpoints, energy):
    subspace = build(**checkpoints, energy=energy)
    for name, v in dense(checkpoints).items():
        squares = np.linalg.svd(v, compute_uv=False) ** 2
        if energy < 1:
            expected = int(np.searchsorted(np.cumsum(squares), energy * squares.sum())) + 1
            assert subspace.modules[name].rank == expected
        assert subspace.modules[name].energy >= energy - 1e-5


def test_a_rank_beyond_that_of_v_keeps_what_there_is(build, checkpoints):
    modules = build(**checkpoints, rank=500).modules
    assert all(module.rank <= min(SHAPES[name]) for name, module in modules.items())
    assert all(module.energy == pytest.approx(1, abs=1e-5) for module in modules.values())


def test_the_same_input_gives_the_same_bytes(build, checkpoints, tmp_path):
    for number in (1, 2, 5):
        build(**checkpoints, rank=5, threads=number).save(tmp_path / f"{number}.safetensors")
    written = {(tmp_path / f"{number}.safetensors").read_bytes() for number in (1, 2, 5)}
    assert len(written) == 1
    build(**checkpoints, rank=5, seed=1).save(tmp_path / "seed.safetensors")
    assert (tmp_path / "seed.safetensors").read_bytes() not in written


def test_a_module_without_difference_has_rank_zero(build, checkpoints):
    same = "model.layers.0.self_attn.q_proj.weight"
    base, shard = load_file(checkpoints["base"] / "model.safetensors"), checkpoints["aligned"] / "model-0.safetensors"
    assert set(load_file(shard)) == {same}
    save_file({same: base[same]}, shard)
    modules = build(**checkpoints, rank=5).modules
    assert [module.rank for module in modules.values()] == [0, 5]
    assert modules["model.layers.0.self_attn.q_proj"].left_vectors.shape == (48, 0)
    assert np.isnan(modules["model.layers.0.self_attn.q_proj"].energy)
    with pytest.raises(PairingError, match="the same weights in every module"):
        build(aligned=checkpoints["base"], base=checkpoints["base"], rank=5)


def test_modules_are_chosen_by_their_last_components(build, checkpoints):
    for ending in ("down_proj", "mlp.down_proj", "model.layers.0.mlp.down_proj"):
        found = build(**checkpoints, modules=[ending], rank=2)
        assert list(found.modules) == ["model.layers.0.mlp.down_proj"]
    with pytest.raises(PairingError, match="'c_attn'; its modules end in down_proj, lm_head, norm, q_proj"):
        build(**checkpoints, modules=["q_proj", "c_attn"])
    with pytest.raises(PairingError, match="'own_proj'"):
        build(**checkpoints, modules=["own_proj"])
    with pytest.raises(PairingError, match=r"norm.*only linear layers"):
        build(**checkpoints, modules=["norm"])


def test_nan_weights_are_named(build, checkpoints):
    path = checkpoints["base"] / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = np.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r'down_proj.weight" holds .* row 3, column 5'):
        build(**checkpoints)


def test_progress_counts_bytes_and_names_modules(build, checkpoints):
    told = []

    class Progress:
        def start(self, total_bytes, modules):
            told.append((total_bytes, modules))

        def advance(self, done_bytes, module):
            told.append((done_bytes, module))

    build(**checkpoints, rank=2, progress=Progress())
    sizes = [8 * rows * columns for rows, columns in SHAPES.values()]
    assert told[0] == (sum(sizes), 2)
    assert told[1] in [(done, "model.layers.0.self_attn.q_proj") for done in (sizes[0], sum(sizes))]  # it works ahead
    assert told[2:] == [(sum(sizes), "model.layers.0.mlp.down_proj")]


def test_provenance(checkpoints, tmp_path):
    subspace = SafeSubspace.build(**checkpoints, rank=2, modules=["q_proj"])
    assert subspace.sources["aligned"]["source"] == str(checkpoints["aligned"])
    (described,) = subspace.sources["base"]["files"]
    assert described["size"] == (checkpoints["base"] / "model.safetensors").stat().st_size
    assert len(described["fingerprint"]) == 64
    assert [file["name"] for file in subspace.sources["aligned"]["files"]] == [
        f"model-{i}.safetensors" for i in range(4)
    ]
    assert subspace.settings["rank"] == 2
    assert subspace.settings["modules"] == ["q_proj"]
    assert SafeSubspace.from_sources(**checkpoints).sources == subspace.sources
    reopen(subspace.sources["base"], role="base")
    shutil.move(checkpoints["base"], tmp_path / "moved")
    with pytest.raises(CheckpointError, match="base: the base model that the subspace was built from is gone"):
        reopen(subspace.sources["base"], role="base")


@pytest.mark.parametrize("place", [0, 5_000_000, 9_999_999])
def test_a_fingerprint_notices_a_page_and_a_header(tmp_path, place):
    """A large file is sampled, but its start and end are always read."""
    path = tmp_path / "model.safetensors"
    weight = np.zeros(10_000_000, np.uint8)
    save_file({"a": weight}, path)
    save_file({"a": weight + 1}, tmp_path / "aligned.safetensors")
    subspace = SafeSubspace.from_sources(aligned=tmp_path / "aligned.safetensors", base=path)
    weight[max(place - 12_000, 0) : place + 12_000] = 1
    save_file({"a": weight}, path)
    with pytest.raises(CheckpointError, match=r"has changed since the subspace was built from it \(model.safetensors"):
        reopen(subspace.sources["base"], role="base")
    weight[:] = 0
    save_file({"b": weight}, path)
    with pytest.raises(CheckpointError, match="has changed"):
        reopen(subspace.sources["base"], role="base")


def test_a_file_that_came_or_went_is_a_change(checkpoints):
    sources = SafeSubspace.from_sources(**checkpoints).sources
    index = checkpoints["aligned"] / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["lm_head.weight"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"changed.*\(model-2.safetensors differs\)"):
        reopen(sources["aligned"], role="aligned")


def test_refusals(build, checkpoints, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: the aligned model is neither a file"):
        build(aligned=tmp_path / "nowhere", base=checkpoints["base"])
    save_file({"model.layers.0.self_attn.q_proj.weight": np.ones((48, 40), np.float32)}, tmp_path / "part.safetensors")
    with pytest.raises(PairingError, match=r"layers\.0\.mlp\.down_proj: the base model .* has no tensor"):
        build(aligned=checkpoints["aligned"], base=tmp_path / "part.safetensors")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rank": 0}, "rank must lie between 1 and"),
        ({"energy": 1.5}, "energy"),
        ({"rank": 2, "energy": 0.5}, "one of rank and energy, not both"),
        ({"seed": -1}, "seed"),
        ({"threads": 0}, "threads"),
        ({"modules": []}, "modules"),
        ({"device": "tpu"}, "device must be one of cpu, cuda, xpu"),
        ({"device": "meta"}, "device"),
    ],
    ids=str,
)
def test_settings_out_of_range(build, checkpoints, wrong, words):
    with pytest.raises(SettingsError, match=words):
        build(**{**checkpoints, **wrong})


def test_the_file_is_whole_or_absent(checkpoints, tmp_path, monkeypatch):
    subspace = SafeSubspace.build(**checkpoints, rank=2)
    target = tmp_path / "new" / "safe.safetensors"

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safelora_fast.files.output.sync", fail)
    with pytest.raises(OutputError, match="the disk is full"):
        subspace.save(target)
    assert not target.parent.exists()
    monkeypatch.undo()
    subspace.save(target)
    assert [path.name for path in target.parent.iterdir()] == ["safe.safetensors"]
    loaded = SafeSubspace.load(target)
    assert list(loaded.modules) == list(subspace.modules)
    assert loaded.to_dict() == subspace.to_dict()


def test_shards_in_any_order_give_the_same_subspace(build, tmp_path):
    """The aligned model is read from shards, and again from one file with its names in reverse order."""
    pair = write_pair(tmp_path)
    built = build(aligned=pair.aligned, base=pair.base, rank=3)
    assert set(built.modules) == set(module_names())
    tensors = {}
    for shard in pair.aligned.glob("*.safetensors"):
        tensors.update(load_file(shard))
    save_file(dict(reversed(tensors.items())), tmp_path / "one.safetensors")
    again = build(aligned=tmp_path / "one.safetensors", base=pair.base, rank=3)
    for name, module in built.modules.items():
        assert np.array_equal(again.modules[name].left_vectors, module.left_vectors)
