"""The subspace of one module: the leading left singular vectors of V."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ModuleSubspace:
    """The subspace of one module, with V = aligned − base of shape (m, n).

    Attributes:
        left_vectors: U_k [m, k], float32, orthonormal columns.
        singular_values: σ_k [k], float32, descending.
        v_norm: ‖V‖_F.
        columns: n.
    """

    left_vectors: np.ndarray
    singular_values: np.ndarray
    v_norm: float
    columns: int

    @property
    def rank(self) -> int:
        """Number of vectors k; 0 if V is zero."""
        return int(self.left_vectors.shape[1])

    @property
    def spectral_norm(self) -> float:
        """σ₁, the largest singular value of V; 0 if V is zero."""
        return float(self.singular_values[0]) if self.rank else 0.0

    @property
    def energy(self) -> float:
        """Share of ‖V‖²_F in the subspace; NaN if V is zero."""
        if self.v_norm == 0:
            return float("nan")
        kept = float(np.square(self.singular_values.astype(np.float64)).sum())
        return kept / self.v_norm / self.v_norm  # the square of a large norm overflows float64

    def __repr__(self) -> str:
        shape = f"({self.left_vectors.shape[0]}, {self.columns})"
        return (
            f"ModuleSubspace(V of shape {shape}, rank={self.rank}, v_norm={self.v_norm:.4g}, energy={self.energy:.4g})"
        )
