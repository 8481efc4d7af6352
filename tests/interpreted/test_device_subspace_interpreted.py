"""Safe subspaces on a device, from checkpoints to the file, by the Triton kernels."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from families import FAMILIES, save

from safelora_fast import SafeSubspace
from safelora_fast.ops import backends
from safelora_fast.projection.device import subspace_stream
from safelora_fast.projection.device.subspace_stream import SubspaceStream

CASES = [("llama", {"rank": 5}), ("gpt2", {"energy": 0.7})]  # the second keeps its weights transposed


@pytest.mark.parametrize(("name", "extent"), CASES, ids=str)
def test_the_same_subspaces(name, extent, tmp_path, monkeypatch):
    family = FAMILIES[name]
    sources = {"aligned": save(family.make(1), tmp_path / "aligned"), "base": save(family.make(2), tmp_path / "base")}
    assert backends.choose("subspace_projections", [torch.zeros(2)]).name == "triton"
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
