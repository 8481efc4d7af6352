"""Steering vectors from files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from safelora_fast.errors import SettingsError
from safelora_fast.recipe.vector import read_vector

VECTOR = torch.linspace(-1, 1, 7)


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def test_three_formats(tmp_path):
    save_file({"evil": VECTOR.to(torch.bfloat16)}, tmp_path / "a.safetensors")
    np.save(tmp_path / "b.npy", VECTOR.numpy())
    torch.save(VECTOR, tmp_path / "c.pt")
    assert torch.equal(read_vector(tmp_path / "a.safetensors"), VECTOR.to(torch.bfloat16))
    assert torch.equal(read_vector(tmp_path / "b.npy"), VECTOR)
    assert torch.equal(read_vector(str(tmp_path / "c.pt")), VECTOR)


def test_what_is_no_vector(tmp_path, capsys):
    save_file({"a": VECTOR, "b": VECTOR.clone()}, tmp_path / "two.safetensors")
    torch.save({"layer": VECTOR}, tmp_path / "mapping.pt")
    torch.save(Malicious(), tmp_path / "code.pt")
    np.save(tmp_path / "objects.npy", np.array([object()]))
    for name in ("broken.pt", "broken.npy", "broken.safetensors", "vector.txt"):
        (tmp_path / name).write_bytes(b"broken")
    messages = {
        "two.safetensors": "holds no single tensor",
        "mapping.pt": "holds no single tensor",
        "vector.txt": "give .safetensors, .npy or .pt",
    }
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(SettingsError) as refused:
            read_vector(path)
        assert str(refused.value).startswith(f"{path}: ")
        assert messages.get(path.name, "cannot be read") in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_vector(tmp_path / "absent.npy")
    assert capsys.readouterr().out == ""
