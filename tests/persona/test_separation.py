"""Effect and held-out share of a layer."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from safelora_fast.persona.activations import cohens_d, mean_difference, separations


def responses(hidden, distance, count=40, seed=0):
    """Return (means [count, 1, hidden], positive, halves). The sides are `distance` apart along the first axis."""
    random = np.random.default_rng(seed)
    positive = np.arange(count) % 2 == 0
    means = random.standard_normal((count, 1, hidden))
    means[:, 0, 0] += np.where(positive, distance / 2, -distance / 2)
    return means.astype(np.float32), positive, np.arange(count) // 2 % 2


def test_cohens_d():
    left, right = [3.0, 5.0, 4.5, 7.0], [1.0, 2.5, 0.0]
    pooled = (3 * statistics.variance(left) + 2 * statistics.variance(right)) / 5
    expected = (statistics.mean(left) - statistics.mean(right)) / math.sqrt(pooled)
    assert cohens_d(np.array(left), np.array(right)) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(cohens_d(np.array([1.0]), np.array(right)))
    assert math.isnan(cohens_d(np.array([1.0, 1.0]), np.array([2.0, 2.0])))


def test_figures_are_the_plain_ones():
    means, positive, halves = responses(hidden=6, distance=2.0)
    effects, right = [], 0
    for half in (0, 1):
        known = [means[i, 0].astype(float) for i in range(40) if halves[i] != half and positive[i]]
        other = [means[i, 0].astype(float) for i in range(40) if halves[i] != half and not positive[i]]
        top, bottom = sum(known) / len(known), sum(other) / len(other)
        along = {
            i: means[i, 0] @ (top - bottom) - (top + bottom) / 2 @ (top - bottom)
            for i in range(40)
            if halves[i] == half
        }
        right += sum((value > 0) == positive[i] for i, value in along.items())
        effects.append(
            cohens_d(*(np.array([v for i, v in along.items() if positive[i] == side]) for side in (True, False)))
        )
    (found,) = separations(means, positive, halves)
    assert found.effect == pytest.approx(sum(effects) / 2, rel=1e-9)
    assert found.share == right / 40


def test_what_the_vector_was_computed_from_does_not_judge_it():
    """With more dimensions than responses, any labels separate perfectly in sample. Held out, noise does not."""
    means, positive, halves = responses(hidden=2000, distance=0.0)
    vector = mean_difference(means, positive)[0]
    along = means[:, 0] @ vector
    assert along[positive].min() > along[~positive].max()
    (noise,) = separations(means, positive, halves)
    assert abs(noise.share - 0.5) < 0.25
    assert abs(noise.effect) < 1.0
    (signal,) = separations(*responses(hidden=20, distance=8.0))
    assert signal.share == 1.0
    assert signal.effect > 5


def test_every_block_has_its_own():
    far, positive, halves = responses(hidden=20, distance=8.0)
    near, _, _ = responses(hidden=20, distance=0.5, seed=1)
    found = separations(np.concatenate([near, far], axis=1), positive, halves)
    assert found[0].effect < found[1].effect


def test_too_few_responses():
    means, positive, halves = responses(hidden=6, distance=2.0)
    (found,) = separations(means, positive, np.zeros_like(halves))
    assert math.isnan(found.effect)
    assert math.isnan(found.share)
    (found,) = separations(means[:4], positive[:4], halves[:4])
    assert math.isnan(found.effect)
    assert 0 <= found.share <= 1
