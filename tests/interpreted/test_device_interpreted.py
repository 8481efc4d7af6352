"""Projection and safe subspaces on a device with the Triton kernels, from checkpoints to output files."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from families import FAMILIES, adapt, save
from safetensors.torch import load_file

from safelora_fast import SafeSubspace, project_adapter
from safelora_fast.ops.subspace_projection import OP
from safelora_fast.projection.device import subspace_stream
from safelora_fast.projection.device.stream import DeviceStream
from safelora_fast.projection.device.subspace_stream import SubspaceStream
from safelora_fast.projection.project import project_folders
from safelora_fast.projection.settings import Settings


@pytest.fixture
def sources(family, tmp_path):
    assert OP.choose([torch.zeros(2)]).name == "triton"
    return {"aligned": save(family.make(1), tmp_path / "aligned"), "base": save(family.make(2), tmp_path / "base")}


@pytest.fixture
def family(request):
    return FAMILIES[request.param]


@pytest.mark.parametrize(
    ("family", "settings"),
    [("gpt2", {"normalize": "spectral", "select": "number", "num_layers": 3})],
    indirect=["family"],
)
def test_the_same_report_and_adapter(family, settings, sources, tmp_path):
    adapter = save(adapt(family.make(1), **family.target), tmp_path / "adapter")
    theirs = project_adapter(adapter, **sources, output=tmp_path / "extension", **settings)
    start = partial(DeviceStream, device=torch.device("cpu"), batch_bytes=20000)
    ours = project_folders(adapter, Settings(**settings), **sources, output=tmp_path / "device", start=start)
    for one, other in zip(ours.adapters[0].modules, theirs.adapters[0].modules, strict=True):
        assert (one.name, one.projected) == (other.name, other.projected)
        assert one.cosine == pytest.approx(other.cosine, abs=1e-6)
        assert one.gain == pytest.approx(other.gain, rel=1e-5)
    found = load_file(tmp_path / "device" / "adapter_model.safetensors")
    for key, tensor in load_file(tmp_path / "extension" / "adapter_model.safetensors").items():
        assert (found[key] - tensor).norm() <= 2e-5 * tensor.norm()


# GPT-2 stores its weights transposed.
@pytest.mark.parametrize(("family", "extent"), [("llama", {"rank": 5}), ("gpt2", {"energy": 0.7})], indirect=["family"])
def test_the_same_subspaces(family, extent, sources, monkeypatch):  # noqa: ARG001
    monkeypatch.setattr(subspace_stream, "SubspaceStream", partial(SubspaceStream, batch_bytes=20000))
    theirs, ours = SafeSubspace.build(**sources, **extent), SafeSubspace.build(**sources, **extent, device="cpu")
    assert list(ours.modules) == list(theirs.modules)
    for module, expected in theirs.modules.items():
        found = ours.modules[module]
        assert found.rank == expected.rank
        assert found.v_norm == pytest.approx(expected.v_norm, rel=1e-6)
        assert np.abs(found.singular_values - expected.singular_values).max() <= 1e-6 * expected.spectral_norm
        vectors, others = (each.left_vectors.astype(np.float64) for each in (found, expected))
        assert np.abs(vectors.T @ vectors - np.eye(found.rank)).max() < 1e-6
        assert np.linalg.norm(vectors - others @ (others.T @ vectors), 2) < 1e-3
