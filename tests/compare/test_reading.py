"""Sentences that warn of chance."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from safelora_fast.compare.conclusions import _caveats


@pytest.mark.parametrize(
    ("count", "words"), [(2, "of which 0.1 would"), (6, "of which 0.3 would"), (40, "of which 2 would")]
)
def test_so_many_comparisons_look_clear_by_chance(count, words):
    (said,) = _caveats(SimpleNamespace(seeds=(0, 1)), count)
    assert f"These are {count} comparisons at 95 %, {words} look clear by chance alone, on average" in said
