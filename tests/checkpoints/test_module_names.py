"""Layers, kinds and display order of modules, from their names."""

from __future__ import annotations

import pytest

from safelora_fast.checkpoints.module_names import kinds, layer_of, natural_order


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.11.self_attn.q_proj", 11),
        ("model.layers.3.mlp.experts.7.gate_up_proj", 3),
        ("transformer.h.0.attn.c_attn", 0),
        ("lm_head", None),
        ("model.embed_tokens", None),
        ("visual.merger.mlp.2", None),
    ],
)
def test_layers(name, layer):
    assert layer_of(name) == layer


def test_kinds_are_told_apart_by_the_shortest_end():
    gpt2 = [f"transformer.h.{block}.{end}" for block in (0, 1) for end in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")]
    assert list(kinds(gpt2).values()) == ["attn.c_proj", "mlp.c_proj", "c_fc"] * 2
    moe = ["model.layers.0.mlp.experts.4.down_proj", "model.layers.0.mlp.experts.5.down_proj"]
    assert set(kinds(moe).values()) == {"down_proj"}
    shared = [*moe, "model.layers.0.mlp.shared_expert.down_proj"]
    assert set(kinds(shared).values()) == {"experts.down_proj", "shared_expert.down_proj"}


def test_a_kind_whose_whole_path_ends_another():
    assert kinds(["proj", "merger.proj"]) == {"proj": "proj", "merger.proj": "merger.proj"}


def test_natural_order():
    names = [
        "model.embed_tokens",
        "model.layers.2.self_attn.q_proj",
        "model.layers.10.mlp.experts.2.down_proj",
        "model.layers.10.mlp.experts.11.down_proj",
        "model.layers.10.self_attn.q_proj",
        "lm_head",
    ]
    assert sorted(names[3:] + names[:3], key=natural_order) == names
