"""Copied tensors: NaN and infinite values are counted in each dtype, and a warning names the tensor."""

from __future__ import annotations

import json

import pytest
import torch
from plain_pair import write_pair
from safetensors.torch import load_file, save_file

from safelora_fast import project_adapter
from safelora_fast.projection import copied_tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("piece", [2, 1 << 21])
def test_what_is_not_finite_is_counted_and_stays(tmp_path, monkeypatch, dtype, piece):
    monkeypatch.setattr(copied_tensors, "PIECE", piece)
    pair = write_pair(tmp_path)
    path = pair.adapter / "adapter_model.safetensors"
    sound = torch.tensor([0.0, -0.0, 1.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny], dtype=dtype)
    damaged = torch.cat([torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf], dtype=dtype), sound])
    more = {"odd": torch.zeros(3, dtype=torch.int8), "sound": sound, "damaged": damaged, "empty": sound[:0].clone()}
    save_file({**load_file(path), **{f"base_model.model.{name}.weight": more[name] for name in more}}, path)
    report = project_adapter(pair.adapter, aligned=pair.aligned, base=pair.base, output=pair.output, select="all")
    (warning,) = [warning for warning in report.warnings if "NaN" in warning]
    assert "base_model.model.damaged.weight, which is copied through, holds NaN or Inf (4 values)" in warning
    written = json.loads((pair.output / "safelora_report.json").read_text())["adapters"][0]["copied"]
    counts = {entry["tensor"].split(".")[2]: entry["not_finite"] for entry in written}
    assert counts == {"odd": 0, "sound": 0, "damaged": 4, "empty": 0}
    after = load_file(pair.output / "adapter_model.safetensors")["base_model.model.damaged.weight"]
    assert after.view(torch.uint8).tolist() == damaged.view(torch.uint8).tolist()
