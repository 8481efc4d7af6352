"""The highest scores, against a full sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelora_fast.data.rows import top_k


def plain(scores, k):
    known = [index for index, score in enumerate(scores) if score == score]  # noqa: PLR0124 - NaN is not itself
    return sorted(known, key=lambda index: (-scores[index], index))[:k]


SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("inf"), float("-inf"), float("nan")]), max_size=30)


@given(SCORES, st.integers(0, 35))
def test_ties_go_to_the_lower_index_and_nan_to_nobody(scores, k):
    assert top_k(scores, k).tolist() == plain(scores, k)


@pytest.mark.parametrize("k", [1, 999, 5000, 20_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_many_scores(k, dtype):
    scores = (np.random.default_rng(k).standard_normal(10_000) * 50).astype(dtype)
    assert top_k(scores, k).tolist() == plain(scores.tolist(), k)
