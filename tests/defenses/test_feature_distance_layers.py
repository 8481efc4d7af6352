from __future__ import annotations

import numpy as np
import pytest

from safelora_fast.defenses.feature_distance import FeatureDistance, evenly_spaced
from safelora_fast.errors import SettingsError


@pytest.mark.parametrize("depth", [5, 6, 24, 28, 30, 32, 33, 64, 80])
def test_evenly_spaced_is_the_papers_linspace(depth):
    assert evenly_spaced(depth, 5) == np.linspace(0, depth - 1, 5, dtype=int).tolist()


@pytest.mark.parametrize("layers", ["every:0", "every:", "some", 0, [], [1, 1]])
def test_wrong_layers(layers):
    with pytest.raises(SettingsError, match="FeatureDistance: layers"):
        FeatureDistance(layers=layers)
