"""The highest of many scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def top_k(scores: ArrayLike, k: int) -> np.ndarray:
    """Indices of the k highest scores, highest first; of equal ones the lower index comes first. NaN is never among them.

    A partition finds the k-th highest in one pass, so that only k are sorted.

    Args:
        scores: any number of them.
        k: how many; all that are no NaN where there are fewer.

    Returns:
        int64 [at most k].
    """
    values = np.asarray(scores)
    values = values.astype(np.float64) if values.dtype.kind != "f" else values
    if np.isnan(values).any():
        known = np.flatnonzero(~np.isnan(values))
        of_known: np.ndarray = known[top_k(values[known], k)]
        return of_known
    count = min(k, len(values))
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    if count < len(values):
        lowest = np.partition(values, len(values) - count)[len(values) - count]
        above = np.flatnonzero(values > lowest)
        equal = np.flatnonzero(values == lowest)[: count - len(above)]
        chosen = np.concatenate([above, equal])
    else:
        chosen = np.arange(len(values))
    order: np.ndarray = chosen[np.lexsort((chosen, -values[chosen]))]
    return order
