"""A projection on a device, from checkpoints to the adapter, by the Triton kernels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from families import FAMILIES, adapt, save
from safetensors.torch import load_file

from safelora_fast import project_adapter
from safelora_fast.ops import backends
from safelora_fast.projection.device.stream import DeviceStream
from safelora_fast.projection.project import project_folders
from safelora_fast.projection.settings import Settings

CASES = [("llama", {"select": "all"}), ("gpt2", {"normalize": "spectral", "select": "number", "num_layers": 3})]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_the_same_report_and_adapter(name, settings, tmp_path):
    family = FAMILIES[name]
    sources = {"aligned": save(family.make(1), tmp_path / "aligned"), "base": save(family.make(2), tmp_path / "base")}
    adapter = save(adapt(family.make(1), **family.target), tmp_path / "adapter")
    assert backends.choose("subspace_projections", [torch.zeros(2)]).name == "triton"
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
