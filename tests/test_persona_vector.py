"""The file of a persona vector, and the layer that it suggests."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from personas import random_persona, save_persona
from safetensors import safe_open
from safetensors.numpy import save_file

from safelora_fast.errors import CheckpointError, OutputError
from safelora_fast.persona_vector import PersonaVector, Separation


def test_a_saved_vector_comes_back_and_the_same_gives_the_same_bytes(tmp_path):
    vector = replace(
        random_persona(), separation=[Separation(1.5, 0.75), Separation(math.nan, math.nan), Separation(2, 1)]
    )
    vector.save(tmp_path / "new" / "a.safetensors")
    vector.save(tmp_path / "b.safetensors")
    assert (tmp_path / "new" / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = PersonaVector.load(tmp_path / "b.safetensors")
    assert np.array_equal(loaded.vectors, vector.vectors)
    assert loaded.vectors.dtype == np.float32
    assert (loaded.trait, loaded.provenance) == (vector.trait, vector.provenance)
    assert loaded.to_dict() == vector.to_dict()
    assert loaded.to_dict()["blocks"][1]["effect"] is None
    json.dumps(loaded.to_dict(), allow_nan=False)
    with safe_open(tmp_path / "b.safetensors", framework="numpy") as file:
        assert list(file.keys()) == ["vectors"]
        assert file.get_slice("vectors").get_shape() == [3, 32]


def test_the_suggestion_is_the_largest_effect_in_the_middle():
    def suggestion(effects):
        return replace(
            random_persona(blocks=len(effects)), separation=[Separation(effect, 1.0) for effect in effects]
        ).suggestion

    effects = [0.0] * 30
    effects[4], effects[26], effects[17], effects[12] = 9.0, 8.0, 2.0, 1.0
    assert suggestion(effects) == 17
    assert suggestion([math.nan] * 30) is None
    assert suggestion([3.0]) == 0
    assert suggestion([5.0, 1.0, 5.0]) == 1
    vector = random_persona(blocks=28)
    assert (vector.candidates[0], vector.candidates[-1]) == (9, 22)
    assert "layers 9 to 22" in vector.rule
    assert replace(vector, separation=()).suggestion is None


def test_files_that_are_no_persona_vector(tmp_path):
    save_file({"vectors": np.ones((2, 4), np.float32)}, tmp_path / "plain.safetensors")
    metadata = {"safelora_fast.persona": json.dumps({"version": 1, "trait": "t", "separation": [], "provenance": {}})}
    save_file({"vectors": np.ones(4, np.float32)}, tmp_path / "flat.safetensors", metadata=metadata)
    save_file({"vectors": np.full((2, 4), np.nan, np.float32)}, tmp_path / "nan.safetensors", metadata=metadata)
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    odd = {"safelora_fast.persona": json.dumps({"version": 1, "trait": "t", "separation": [], "provenance": []})}
    save_file({"vectors": np.ones((2, 4), np.float32)}, tmp_path / "odd.safetensors", metadata=odd)
    whole = save_persona(tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-40])
    for name in ("plain", "flat", "nan", "odd", "broken", "cut", "absent"):
        with pytest.raises(CheckpointError, match=rf"{name}\.safetensors: "):
            PersonaVector.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(OutputError, match="cannot be written"):
        random_persona().save(tmp_path / "broken.safetensors" / "inside")
