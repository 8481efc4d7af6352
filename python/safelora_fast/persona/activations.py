"""Mean activations of responses, the difference of the two sides, and how well it separates responses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from safelora_fast.models.token_means import token_means
from safelora_fast.persona_vector import Separation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from safelora_fast.models.anatomy import Anatomy


def response_means(
    anatomy: Anatomy,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    batch_size: int,
    padding: int,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Return the mean output of every layer over the tokens of each response: [responses, layers, hidden] float32.

    Layers are numbered, and their outputs read, as in the defenses. One forward pass gives all layers, and each output
    is averaged immediately.

    Args:
        anatomy: the model's parts; the model is in evaluation mode.
        prompts: the tokens before each response.
        responses: the tokens of each response, at least one.
        batch_size: responses per batch; a batch has responses of similar length.
        padding: the padding token.
        advance: called with the number of responses done.

    Raises:
        SettingsError: the layers return several hidden states for each token.
    """
    anatomy.check_outputs(owner="persona vectors")
    means = np.empty((len(responses), anatomy.depth, anatomy.config.hidden_size), np.float32)
    order = sorted(range(len(responses)), key=lambda index: len(prompts[index]) + len(responses[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = _batch_means(anatomy, [(prompts[index], responses[index]) for index in chosen], padding)
        means[chosen] = batch.float().cpu().numpy()
        advance(start + len(chosen))
    return means


def _batch_means(anatomy: Anatomy, batch: Sequence[tuple[Sequence[int], Sequence[int]]], padding: int) -> torch.Tensor:
    sequences = [[*prompt, *response] for prompt, response in batch]
    places = [range(len(prompt), len(prompt) + len(response)) for prompt, response in batch]
    return token_means(anatomy, sequences, places, range(anatomy.depth), padding)


def mean_difference(means: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Return the mean over the positive responses minus the mean over the negative ones, in float64.

    Args:
        means: [responses, …].
        positive: [responses] booleans.
    """
    difference: np.ndarray = means[positive].mean(0, dtype=np.float64) - means[~positive].mean(0, dtype=np.float64)
    return difference


def separations(means: np.ndarray, positive: np.ndarray, halves: np.ndarray) -> list[Separation]:
    """Measure how well each layer's vector separates held-out responses, by two-fold cross-validation over questions.

    Vector and midpoint come from one half, and the metrics from the other. The effect is the mean of both halves'
    Cohen's d; the share is over all responses. Both are NaN if a half has no responses of one side. The effect is also
    NaN if a half has fewer than two.

    Args:
        means: [responses, layers, hidden].
        positive: [responses] booleans: whether the prompt asked for the trait.
        halves: [responses] 0 or 1: the half that the question belongs to.
    """
    return [_separation(means[:, layer].astype(np.float64), positive, halves) for layer in range(means.shape[1])]


def _separation(means: np.ndarray, positive: np.ndarray, halves: np.ndarray) -> Separation:
    effects, right = [], 0
    for half in (0, 1):
        known, held_out = halves != half, halves == half
        if not all((positive[part] == side).any() for part in (known, held_out) for side in (True, False)):
            return Separation(math.nan, math.nan)
        sides = [means[known & (positive == side)].mean(0) for side in (True, False)]
        vector = sides[0] - sides[1]
        along = means[held_out] @ vector - (sides[0] + sides[1]) @ vector / 2
        right += int(((along > 0) == positive[held_out]).sum())
        effects.append(cohens_d(along[positive[held_out]], along[~positive[held_out]]))
    return Separation(sum(effects) / len(effects), right / len(positive))


def cohens_d(first: np.ndarray, second: np.ndarray) -> float:
    """Return the difference of the means over the pooled standard deviation.

    NaN with fewer than two values per side, or without spread.
    """
    if min(len(first), len(second)) < 2:
        return math.nan
    squares = ((first - first.mean()) ** 2).sum() + ((second - second.mean()) ** 2).sum()
    spread = squares / (len(first) + len(second) - 2)
    return float((first.mean() - second.mean()) / math.sqrt(spread)) if spread > 0 else math.nan
