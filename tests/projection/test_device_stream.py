"""Projection on a torch device (here the CPU), compared with the dense float64 oracle and the Rust extension."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from families import FAMILIES, Projected, adapt, assert_projected, rewrite, save, weights
from safetensors.torch import load_file

from safelora_fast.checkpoints.adapter import load_adapter
from safelora_fast.checkpoints.sources import open_checkpoint
from safelora_fast.errors import AdapterError, BackendError, CheckpointError, PairingError, SettingsError
from safelora_fast.projection.device.stream import DeviceStream, torch_device
from safelora_fast.projection.plan import plan_projection
from safelora_fast.projection.project import project_adapter, project_folders
from safelora_fast.projection.settings import Settings

CPU = torch.device("cpu")
METRICS = ["gain", "b_norm", "b_norm_after", "update_norm", "update_norm_after", "v_norm"]
SMALL_BATCHES = partial(DeviceStream, device=CPU, batch_bytes=8000)  # a few modules, or a single larger one


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    family = FAMILIES["llama"]
    sources = {"aligned": save(family.make(1), folder / "aligned"), "base": save(family.make(2), folder / "base")}
    return save(adapt(family.make(1), **family.target), folder / "adapter"), sources


def compare(adapter, sources, folder, start=SMALL_BATCHES, **settings):
    """Project with the extension and on the device into two folders, compare them, and return the device's report."""
    theirs = project_adapter(adapter, **sources, output=folder / "extension", **settings)
    ours = project_folders(adapter, Settings(**settings), **sources, output=folder / "device", start=start)
    assert ours.bytes_read == theirs.bytes_read > 0
    for one, other in zip(ours.adapters[0].modules, theirs.adapters[0].modules, strict=True):
        assert (one.name, one.projected, one.reason) == (other.name, other.projected, other.reason)
        assert (one.v_rank, one.sources, one.rank) == (other.v_rank, other.sources, other.rank)
        assert one.cosine == pytest.approx(other.cosine, abs=1e-6, nan_ok=True)
        assert (one.v_energy or 1.0) == pytest.approx(other.v_energy or 1.0, rel=1e-5)
        for metric in METRICS:
            assert getattr(one, metric) == pytest.approx(getattr(other, metric), rel=2e-5, abs=1e-30, nan_ok=True)
    before, found, expected = (
        load_file(place / "adapter_model.safetensors") for place in (adapter, folder / "device", folder / "extension")
    )
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert (found[key] - tensor).norm() <= 2e-5 * tensor.norm()
        assert torch.equal(found[key], before[key]) == torch.equal(tensor, before[key])
    return ours


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_against_dense_float64(name, tmp_path):
    family = FAMILIES[name]
    aligned, base = save(family.make(1), tmp_path / "aligned"), save(family.make(2), tmp_path / "base")
    adapted, base_weights = adapt(family.make(1), **family.target), weights(adapt(family.make(2), **family.target))
    adapter = save(adapted, tmp_path / "adapter")
    sources = {"aligned": aligned, "base": base}
    modules = compare(adapter, sources, tmp_path, select="all").adapters[0].modules
    plan = plan_projection(
        [load_adapter(adapter)], open_checkpoint(aligned, role="aligned"), open_checkpoint(base, role="base")
    )
    cosines, norms = ({module.name: getattr(module, of) for module in modules} for of in ("cosine", "v_norm"))
    assert_projected(Projected(tmp_path / "device", plan, cosines, norms), adapted, base_weights)


SETTINGS = [
    {"threshold": 0.83},
    {"select": "number", "num_layers": 3},
    {"operator": "zero", "select": "number", "num_layers": 2},
    {"normalize": "spectral", "select": "all"},
    {"operator": "orthogonal", "rank": 5, "select": "all"},
    {"operator": "orthogonal", "energy": 0.8, "select": "number", "num_layers": 9},
    {"operator": "attenuate", "rank": 5, "keep": 0.25, "select": "number", "num_layers": 4},
    {"operator": "attenuate", "energy": 0.8, "keep": 0.5, "sides": "left", "select": "all"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_operators_and_selection(llama, tmp_path, settings):
    adapter, sources = llama
    report = compare(adapter, sources, tmp_path, **settings)
    assert len(report.adapters[0].projected) > 0
    assert report.settings["select"] == settings.get("select", "threshold")


def test_several_adapters_meet_in_one_pass(llama, tmp_path):
    adapter, sources = llama
    family = FAMILIES["llama"]
    other = save(adapt(family.make(1), seed=3, r=2, target_modules=["q_proj", "up_proj"]), tmp_path / "other")
    both = project_folders(
        [adapter, other], Settings(select="all"), **sources, output=tmp_path / "both", start=SMALL_BATCHES
    )
    for place, path in enumerate((adapter, other)):
        alone = project_adapter(path, **sources, output=tmp_path / f"alone-{place}", select="all")
        for one, expected in zip(both.adapters[place].modules, alone.adapters[0].modules, strict=True):
            assert one.cosine == pytest.approx(expected.cosine, abs=1e-6)
            assert one.gain == pytest.approx(expected.gain, rel=1e-5)
        found = load_file(tmp_path / "both" / path.name / "adapter_model.safetensors")
        for key, tensor in load_file(tmp_path / f"alone-{place}" / "adapter_model.safetensors").items():
            assert (found[key] - tensor).norm() <= 1e-5 * tensor.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(llama, tmp_path, dtype):
    adapter, sources = llama
    halved = {
        role: rewrite(path, tmp_path / role, lambda tensors: {name: value.to(dtype) for name, value in tensors.items()})
        for role, path in sources.items()
    }
    lower = rewrite(
        adapter, tmp_path / "lower", lambda tensors: {key: value.to(dtype) for key, value in tensors.items()},
        file="adapter_model.safetensors",
    )  # fmt: skip
    project_adapter(lower, **halved, output=tmp_path / "extension", select="all")
    project_folders(lower, Settings(select="all"), **halved, output=tmp_path / "device", start=SMALL_BATCHES)
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("device", "extension"))
    different = 0
    for key, tensor in expected.items():
        assert found[key].dtype == dtype
        assert torch.allclose(found[key].double(), tensor.double(), rtol=torch.finfo(dtype).eps, atol=1e-6)
        different += int((found[key] != tensor).sum())
    assert different < 0.01 * sum(tensor.numel() for tensor in expected.values())


def test_weights_and_factors_of_other_sizes(llama, tmp_path):
    """Powers of two whose products exceed float32 give correct results, because the factors are scaled."""
    adapter, sources = llama
    for size in (2.0**-100, 2.0**90):
        scaled = rewrite(
            adapter,
            tmp_path / f"scaled-{size}",
            lambda tensors, size=size: {key: value * size for key, value in tensors.items()},
            file="adapter_model.safetensors",
        )
        report = compare(scaled, sources, tmp_path / f"both-{size}", select="all")
        assert all(module.cosine > 0.1 for module in report.adapters[0].modules)


def test_where_v_or_the_update_is_zero(llama, tmp_path):
    adapter, sources = llama
    same = load_file(sources["aligned"] / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    base = rewrite(
        sources["base"], tmp_path / "base", lambda tensors: {**tensors, "model.layers.0.self_attn.q_proj.weight": same}
    )
    empty = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    quiet = rewrite(
        adapter,
        tmp_path / "quiet",
        lambda tensors: {**tensors, empty: torch.zeros_like(tensors[empty])},
        file="adapter_model.safetensors",
    )
    for settings in SETTINGS[1:]:
        report = compare(quiet, {**sources, "base": base}, tmp_path / str(len(settings)), **settings)
        without = {
            module.name: module.reason for module in report.adapters[0].modules if module.cosine != module.cosine
        }
        assert without == {
            "model.layers.0.self_attn.q_proj": "V is zero: aligned and base agree here",
            "model.layers.1.mlp.up_proj": "the update is zero",
        }
        (tmp_path / str(len(settings))).rename(tmp_path / f"done-{settings}")


def refused(adapter, sources, output, kind, **settings):
    with pytest.raises(kind) as found:
        project_folders(adapter, Settings(**settings), **sources, output=output, start=SMALL_BATCHES)
    with pytest.raises(kind) as expected:
        project_adapter(adapter, **sources, output=output, **settings)
    assert not output.exists()
    return str(found.value), str(expected.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["aligned", "base", "lora_A", "lora_B"])
def test_what_is_not_finite_is_named_as_the_extension_names_it(llama, tmp_path, where, value):
    adapter, sources = llama
    name = "model.layers.1.self_attn.o_proj"
    place, file, key = sources.get(where, adapter), "model.safetensors", f"{name}.weight"
    if where.startswith("lora"):
        file, key = "adapter_model.safetensors", f"base_model.model.{name}.{where}.weight"

    def damage(tensors):
        tensors[key][2, 3] = value
        return tensors

    damaged = rewrite(place, tmp_path / "damaged", damage, file=file)
    given = (damaged, sources) if where.startswith("lora") else (adapter, {**sources, where: damaged})
    found, expected = refused(*given, tmp_path / "out", CheckpointError)
    assert found == expected


def test_a_result_beyond_the_range_of_its_dtype(llama, tmp_path):
    adapter, sources = llama
    lower = rewrite(
        adapter,
        tmp_path / "lower",
        lambda tensors: {key: value.half() for key, value in tensors.items()},
        file="adapter_model.safetensors",
    )
    far = rewrite(
        sources["base"], tmp_path / "far", lambda tensors: {key: value * 1e7 for key, value in tensors.items()}
    )
    found, expected = refused(lower, {**sources, "base": far}, tmp_path / "out", AdapterError, select="all")
    assert found.split("holds")[0] == expected.split("holds")[0]
    assert found.partition("at row")[2] == expected.partition("at row")[2]


def test_the_same_weights_twice_are_refused(llama, tmp_path):
    adapter, sources = llama
    sources = {"aligned": sources["aligned"], "base": sources["aligned"]}
    found, expected = refused(adapter, sources, tmp_path / "out", PairingError)
    assert found == expected


def test_batches_are_bounded(llama):
    adapter, sources = llama
    plan = plan_projection(
        [load_adapter(adapter)], *(open_checkpoint(path, role=role) for role, path in sources.items())
    )
    stream = SMALL_BATCHES(plan, Settings(select="all"), keep_projected=False)
    sizes = [sum(pair.wanted.room for pair in batch) for batch in stream._reader]
    stream.close()
    largest = max(module.job.nbytes for module in plan.modules)
    assert len(sizes) > 3
    assert max(sizes) <= max(8000, largest)
    assert sum(sizes) >= stream.nbytes == plan.nbytes


def test_devices_that_are_none():
    with pytest.raises(
        SettingsError, match="device must be one of cpu, cuda, xpu, with a number if need be, not 'tpu'"
    ):
        torch_device("tpu")
    with pytest.raises(SettingsError, match="not 'meta': nothing is computed there"):
        torch_device("meta")
    if not torch.cuda.is_available():
        with pytest.raises(
            BackendError, match=r"device 'cuda' cannot be used .*; leave device out to compute on the CPU"
        ):
            torch_device("cuda")
