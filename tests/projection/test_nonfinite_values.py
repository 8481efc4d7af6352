"""NaN and Inf in tensors that are copied through: counted in every dtype, and warned of by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from plain_pair import write_pair
from safetensors.numpy import load_file
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from safelora_fast import _core, project_adapter
from safelora_fast.projection.nonfinite_values import PIECE, count_not_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float(tmp_path, dtype):
    values = torch.tensor([0.0, -0.0, 1.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny], dtype=dtype)
    damaged = torch.cat([values, torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf], dtype=dtype)])
    tensors = {
        "odd": torch.zeros(3, dtype=torch.int8),
        "sound": values,
        "damaged": damaged,
        "empty": values[:0].clone(),
    }
    save_file(tensors, tmp_path / "t.safetensors")
    file = _core.SafetensorsFile(str(tmp_path / "t.safetensors"))
    assert {name: count_not_finite(file, name) for name in tensors} == {"odd": 0, "sound": 0, "damaged": 4, "empty": 0}


def test_a_tensor_of_several_pieces(tmp_path):
    values = np.zeros(2 * PIECE // 4 + 5, np.float32)
    values[[0, PIECE // 4, -1]] = np.nan
    save_numpy({"large": values}, tmp_path / "t.safetensors")
    assert count_not_finite(_core.SafetensorsFile(str(tmp_path / "t.safetensors")), "large") == 3


def test_the_report_warns_and_the_bytes_stay(tmp_path):
    pair = write_pair(tmp_path)
    path = pair.adapter / "adapter_model.safetensors"
    head = np.ones((3, 16), np.float32)
    head[1, 2:4] = np.nan, np.inf
    save_numpy({**load_file(path), "base_model.model.lm_head.weight": head}, path, {"format": "pt"})
    report = project_adapter(pair.adapter, aligned=pair.aligned, base=pair.base, output=pair.output, select="all")
    (warning,) = [warning for warning in report.warnings if "NaN" in warning]
    assert "base_model.model.lm_head.weight, which is copied through, holds NaN or Inf (2 values)" in warning
    written = json.loads((pair.output / "safelora_report.json").read_text())
    assert [entry["not_finite"] for entry in written["adapters"][0]["copied"]] == [2]
    after = load_file(pair.output / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert after.tobytes() == head.tobytes()
