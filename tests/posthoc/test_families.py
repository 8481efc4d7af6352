"""End to end on every family: adapters that PEFT wrote, checkpoints that transformers wrote, the dense truth in float64."""

from __future__ import annotations

import copy

import pytest
from families import FAMILIES, adapt, assert_projected, project, save, weights


def check(tmp_path, family, *, settings=None, **config):
    made = FAMILIES[family]
    settings = settings or {}
    aligned, base = made.make(1, **settings), made.make(2, **settings)
    folders = save(aligned, tmp_path / "aligned"), save(base, tmp_path / "base")
    config = {**made.target, **config}
    other = adapt(base, **copy.deepcopy(config))
    adapted = adapt(aligned, **config)
    adapter = save(adapted, tmp_path / "adapter")
    (result,) = project([adapter], *folders, tmp_path / "output")
    assert_projected(result, adapted, weights(other))
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_against_the_dense_formula(tmp_path, family):
    check(tmp_path, family)
