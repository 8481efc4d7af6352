"""Reading steering vectors from files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from personas import random_persona, save_persona
from safetensors.torch import save_file

from safelora_fast.defenses.steering_vector import Direction, read_vector
from safelora_fast.errors import SettingsError

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


def test_a_persona_file_gives_the_row_of_a_block(tmp_path):
    persona = random_persona(blocks=3, hidden=7)
    file = save_persona(tmp_path / "malicious.safetensors", blocks=3, hidden=7)
    for layer in (0, 2, -1):
        for source in (file, str(file), persona):
            assert Direction.of(source, layer, owner="A").values.tolist() == persona.vectors[layer].tolist()
    with pytest.raises(
        SettingsError, match=r"A: layer 3 does not exist, .*malicious.safetensors has vectors of 3 layers"
    ):
        Direction.of(file, 3, owner="A")
    with pytest.raises(SettingsError, match="the vector of 'malicious' has vectors of 3 layers"):
        Direction.of(persona, -4, owner="A")


@pytest.mark.parametrize("layer", [None, 1.0, "1", True])
@pytest.mark.parametrize("vector", [VECTOR, random_persona()])
def test_a_layer_is_a_whole_number(vector, layer):
    with pytest.raises(SettingsError, match="Steering: layer must be a whole number, not"):
        Direction.of(vector, layer, owner="Steering")


def test_a_file_with_one_row_for_each_block_but_no_word_of_where_it_is_from(tmp_path):
    """Other projects may store the embeddings as the first row, so the layer of each row would be ambiguous."""
    torch.save(torch.ones(4, 7), tmp_path / "rows.pt")
    with pytest.raises(SettingsError, match=r"the vector has shape \(4, 7\), it must be \[hidden\] floats"):
        Direction.of(tmp_path / "rows.pt", 1, owner="A")
