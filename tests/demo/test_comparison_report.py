"""Figures, words and picture of the training comparison, from made-up measurements."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from safelora_fast.demo import comparison_figures, comparison_picture, comparison_words
from safelora_fast.demo.comparison_figures import Comparison, Cost, Mean, Outcome
from safelora_fast.demo.drift import Answer


def made_up(**points):
    """A comparison from (narrow loss, KL) by name; names of shares make the weakened ones."""
    outcomes = {
        name.replace("_", " "): Outcome(
            Mean(narrow, 0.05), Mean(narrow - 5.0, 0.04), Mean(2.5, 0.1), Mean(change, 0.01), Mean(kl, 0.02)
        )
        for name, (narrow, kl, change) in points.items()
    }
    weakened = {"0.5": Outcome(Mean(4.0, 0.05), Mean(-1.0, 0.04), Mean(2.5, 0.1), Mean(0.0, 0.01), Mean(0.25, 0.02))}
    costs = {name: Cost(1.5, 1.0, 90.0, 0.0, 3_000_000_000) for name in outcomes if name != "reference"}
    settings = {name: "λ 1" for name in outcomes if name not in {"reference", "no defence"}}
    return Comparison(outcomes, costs, weakened, settings)


USUAL = {"reference": (5.0, 0.0, 0.0), "no_defence": (3.0, 1.0, 0.2)}


def test_the_error_is_that_of_resampled_answers():
    """The formula beside a bootstrap over answers."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(10, 60, 40)
    sums = tokens * draw.normal(2.0, 0.5, 40)
    mean = comparison_figures.per_token(sums.tolist(), tokens.tolist())
    assert mean.value == pytest.approx(sums.sum() / tokens.sum())
    chosen = draw.integers(0, 40, (4000, 40))
    spread = (sums[chosen].sum(axis=1) / tokens[chosen].sum(axis=1)).std()
    assert mean.error == pytest.approx(spread, rel=0.05)


def test_changes_are_paired():
    """Answers differ much, the change of each is the same: no error."""
    reference = [Answer(10, 10.0 * index, 0.0) for index in range(1, 6)]
    model = [Answer(10, 10.0 * index + 5.0, 1.0) for index in range(1, 6)]
    found = comparison_figures.outcome({"narrow": model, "general": model}, {"narrow": reference, "general": reference})
    assert (found.narrow.value, found.narrow_change) == (3.5, Mean(0.5, 0.0))
    assert (found.divergence.value, found.general.error > 0.5) == (0.1, True)


def test_drift_along_the_weakened_path():
    """Where KL is the square of the way gone, the interpolation is exact; off the path there is nothing."""
    path = [(5.0, 0.0), (4.0, 0.25), (3.0, 1.0)]
    assert comparison_figures.drift_at(3.5, path) == pytest.approx(0.75**2)
    assert comparison_figures.drift_at(4.0, path) == pytest.approx(0.25)
    assert math.isnan(comparison_figures.drift_at(2.9, path))


def test_cost_leaves_the_first_steps_out():
    slow, usual = [9.0] * 5 + [3.0, 3.0, 4.0], [8.0] * 5 + [2.0, 2.0, 2.0]
    assert comparison_figures.cost(slow, 0.5, 7, usual) == Cost(3.0, 1.5, 55.0, 0.5, 7)


def test_the_words_follow_from_the_figures():
    words = comparison_words.reading(
        made_up(**USUAL, KL=(4.0, 0.1, 0.0), penalty=(4.0, 0.4, -0.1), features=(4.0, 0.27, 0.0), deep=(2.5, 0.9, 0.0))
    )
    assert "went from 5.00 to 3.00, and the model moved 1.000 nats" in words
    assert "KL (λ 1): 50 % of the learning with 10 % of the drift; scaling down: 25 %, so it drifts less" in words
    assert "penalty (λ 1): 50 % of the learning with 40 % of the drift; scaling down: 25 %, so it drifts more" in words
    assert "features (λ 1): 50 % of the learning with 27 % of the drift; scaling down: 25 %, so no clear" in words
    assert "deep (λ 1): 125 % of the learning with 90 % of the drift; no scaling" in words
    assert "fell below the reference's for penalty:" in words
    assert "below about 0.08 in narrow loss and 0.040 in KL" in words
    assert "fell below" not in comparison_words.reading(made_up(**USUAL, KL=(4.0, 0.1, 0.0)))


@pytest.mark.parametrize("seed", range(6))
def test_no_name_covers_another_name_or_marker(seed):
    draw = random.Random(seed)
    names = ["KL", "feature_distance", "SafeLora_at_the_end", "subspace_penalty", "KL_+_feature_distance"]
    spread = draw.choice([0.3, 1.0, 2.0])
    points = {name: (3.0 + spread * draw.random(), spread * draw.random(), 0.0) for name in names}
    figures = made_up(**USUAL, **points)
    figure = Figure(figsize=(8, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    comparison_picture.plot(axis, figures)
    canvas.draw()
    boxes = [label.get_window_extent() for label in comparison_picture.place_labels(axis, figures)]
    assert len(boxes) == 7
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    places = [(outcome.narrow.value, outcome.divergence.value) for outcome in figures.outcomes.values()]
    assert not any(box.contains(*axis.transData.transform(place)) for box in boxes for place in places)
    assert all(figure.bbox.contains(*box.min) and figure.bbox.contains(*box.max) for box in boxes)
