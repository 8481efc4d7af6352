from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from safelora_fast import SafeSubspace

SHAPES = {"q_proj": (512, 512), "up_proj": (1408, 512), "down_proj": (512, 1408)}


@pytest.fixture
def sources(tmp_path):
    """Two bfloat16 checkpoints whose difference has decaying singular values."""
    generator = torch.Generator().manual_seed(0)
    aligned, base = {}, {}
    for layer in range(3):
        for name, (rows, columns) in SHAPES.items():
            left, right = (torch.linalg.qr(torch.randn(size, 256, generator=generator))[0] for size in (rows, columns))
            weight = torch.randn(rows, columns, generator=generator) / 32
            key = f"model.layers.{layer}.{name}.weight"
            base[key] = weight.bfloat16()
            aligned[key] = (weight + (left * 0.95 ** torch.arange(256)) @ right.T).bfloat16()
    save_file(aligned, tmp_path / "aligned.safetensors")
    save_file(base, tmp_path / "base.safetensors")
    return {"aligned": tmp_path / "aligned.safetensors", "base": tmp_path / "base.safetensors"}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("extent", [{"rank": 32}, {"energy": 0.9}], ids=str)
def test_beside_the_extension_twice(device, sources, tmp_path, extent):
    theirs = SafeSubspace.build(**sources, **extent)
    for number in range(2):
        ours = SafeSubspace.build(**sources, **extent, device=str(device))
        ours.save(tmp_path / f"{number}.safetensors")
        for name, expected in theirs.modules.items():
            found = ours.modules[name]
            assert found.rank == expected.rank
            assert found.v_norm == pytest.approx(expected.v_norm, rel=1e-5)
            assert np.abs(found.singular_values - expected.singular_values).max() <= 1e-5 * expected.spectral_norm
            vectors, others = (each.left_vectors.astype(np.float64) for each in (found, expected))
            assert np.abs(vectors.T @ vectors - np.eye(found.rank)).max() < 1e-6
            assert np.linalg.norm(vectors - others @ (others.T @ vectors), 2) < 5e-3
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
