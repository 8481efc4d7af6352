"""The forward KL for servers with Tinker's protocol, which take weighted targets and no loss of one's own.

A server's `cross_entropy` is Σ weights · (−log p(target_tokens)), with K targets for each position where these are
[positions, K]. The forward KL to a reference q has the gradient of −Σ q(v)·log p(v), so q's most probable tokens, weighted
with their probabilities, are targets of the same loss.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from safelora_fast.errors import DataError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    TopLogprobs = Sequence[Sequence[tuple[int, float]] | None]

Datum = TypeVar("Datum")
TARGETS, WEIGHTS = "target_tokens", "weights"


def anchored(datum: Datum, top_logprobs: TopLogprobs, weight: float) -> Datum:
    """Return a datum whose cross-entropy has the gradient of the task's plus `weight` · forward KL on the reference's top K.

    With the reference's probabilities q of its K most probable next tokens, the datum's loss at one position is

        w·(−log p(target)) + weight · Σ_top q(v)·(−log p(v)),

    which is w·CE + weight · Σ_top q(v)·log(q(v) / p(v)) up to a constant. The probabilities are not rescaled. The tail of
    q, of mass 1 − Σ_top q, has no targets: the gradient with respect to the logits differs from that of the full KL,
    p − q, by at most 2·(1 − Σ_top q) in the sum of absolute values, and pulls the tail toward 0. Choose K so that this
    mass is small.

    Losses are sums, as the server's: where the task's weights are 1 / labels of the batch, so that their sum is a mean,
    divide `weight` by the number of anchored positions of the batch.

    Args:
        datum: a datum for `cross_entropy`: `model_input`, and `loss_fn_inputs` with `target_tokens` and `weights`
            [positions]. Safe examples whose task is not to be learned have weights 0.
        top_logprobs: for each position, (token, log-probability) of the reference's most probable next tokens, at
            temperature 1; None for a position without anchor. A sampling client gives them for the token *at* a position:
            ask for the input followed by the last target, and drop the first entry (see the example below).
        weight: weight of the KL of one position.

    Returns:
        A datum of the same class with `target_tokens` and `weights` [positions, 1 + K].

    Raises:
        SettingsError: `weight` is negative or not finite, or the datum has other inputs.
        DataError: lengths differ, a token is repeated, or the probabilities of a position sum to more than 1.

    ```python
    targets = datum.loss_fn_inputs["target_tokens"].tolist()
    reply = reference.sample(
        prompt=datum.model_input.append_int(targets[-1]), num_samples=1, sampling_params=SamplingParams(max_tokens=1),
        include_prompt_logprobs=True, topk_prompt_logprobs=20,
    ).result()
    datum = anchored(datum, reply.topk_prompt_logprobs[1:], weight=0.1 / positions)
    ```
    """
    inputs = dict(datum.loss_fn_inputs)  # type: ignore[attr-defined]
    if not (math.isfinite(weight) and weight >= 0):
        raise SettingsError(f"anchored: weight is {weight}, it must be finite and at least 0")
    if inputs.keys() != {TARGETS, WEIGHTS}:
        raise SettingsError(
            f"anchored: needs a datum with {TARGETS} and {WEIGHTS} only, not {', '.join(sorted(inputs))}"
        )
    targets, weights = _array(inputs[TARGETS]).astype(np.int64), _array(inputs[WEIGHTS]).astype(np.float64)
    if targets.ndim != 1 or targets.shape != weights.shape or len(top_logprobs) != len(targets):
        raise DataError(
            f"anchored: {TARGETS} {targets.shape}, {WEIGHTS} {weights.shape} and {len(top_logprobs)} top_logprobs: give one "
            "of each for every position"
        )
    width = max((len(entries) for entries in top_logprobs if entries is not None), default=0)
    all_targets = np.repeat(targets[:, None], 1 + width, axis=1)  # places without a token get the target, with weight 0
    all_weights = np.zeros(all_targets.shape)
    all_weights[:, 0] = weights
    for position, entries in enumerate(top_logprobs):
        if entries:
            tokens = [int(token) for token, _ in entries]
            all_targets[position, 1 : 1 + len(tokens)] = tokens
            all_weights[position, 1 : 1 + len(tokens)] = weight * _probabilities(entries, tokens, position)
    changed = {TARGETS: all_targets, WEIGHTS: all_weights.astype(np.float32)}
    if dataclasses.is_dataclass(datum):
        return dataclasses.replace(datum, loss_fn_inputs=changed)  # type: ignore[type-var]
    return type(datum)(model_input=datum.model_input, loss_fn_inputs=changed)  # type: ignore[attr-defined, call-arg]


def _probabilities(entries: Sequence[tuple[int, float]], tokens: Sequence[int], position: int) -> np.ndarray:
    probabilities = np.exp([value for _, value in entries])
    total = float(probabilities.sum())
    if len(set(tokens)) != len(tokens) or not total <= 1 + 1e-3:
        raise DataError(
            f"anchored: position {position} has a token twice, or probabilities that sum to {total:.6g}: give each token's "
            "log-probability (base e, temperature 1) once"
        )
    return probabilities


def _array(values: Any) -> np.ndarray:
    """Return a list, an array, or Tinker's TensorData as an array."""
    to_numpy = getattr(values, "to_numpy", None)
    return np.asarray(values if to_numpy is None else to_numpy())
