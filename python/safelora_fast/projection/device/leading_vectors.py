"""Leading left singular vectors of V on any device, computed with the grouped products.

This is the restarted block Krylov iteration of `rust/core/src/projection/subspace.rs` (Halko, Martinsson and Tropp
2011, arXiv 0909.4061, section 4.5; soft locking by Knyazev 2001), with the same tolerances. The columns of Z [n, k] are
an orthonormal basis of right vectors, and Y = V·Z [m, k]. The part of Vᵀ·U outside Z is both the residual and the next
block. Everything except the products with V is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from safelora_fast.ops.subspace_projection import matrix_products, transposed_products

OVERSAMPLING = 8
TOLERANCE = 1e-5
MOST_BLOCKS = 48


@dataclass(frozen=True)
class Extent:
    """The number of vectors to compute: `rank`, or as many as capture the share `energy` of ‖V‖²."""

    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True)
class Leading:
    """U_k and its singular values.

    Attributes:
        vectors: [m, k] float32, orthonormal, on the device of V.
        values: [k] float64 on the CPU, descending.
    """

    vectors: torch.Tensor
    values: torch.Tensor


def leading_vectors(
    pair: tuple[torch.Tensor, torch.Tensor], extent: Extent, *, seed: int = 0, squares: float | None = None
) -> Leading:
    """Compute the leading left singular vectors of V = aligned − base, which must not be zero.

    Singular values below 1e-5 of the largest count as zero, so the result may have fewer vectors than requested.

    Args:
        pair: aligned and base [m, n], as for :func:`subspace_projections`.
        extent: the number of vectors.
        seed: seed of the random start.
        squares: ‖V‖²_F for the energy, if known more accurately than from float32 sums.

    Raises:
        BackendError: the backend in `SAFELORA_FAST_BACKEND` does not support these tensors.
    """
    with torch.no_grad():
        return _Iteration(pair, extent, seed, squares).run()


class _Iteration:
    def __init__(
        self, pair: tuple[torch.Tensor, torch.Tensor], extent: Extent, seed: int, squares: float | None
    ) -> None:
        self._pair, self._extent = pair, extent
        self._sides = pair[0].shape
        self._generator = torch.Generator().manual_seed(seed)
        wanted = 2 * OVERSAMPLING if extent.rank is None else extent.rank + OVERSAMPLING
        images, summed = self._transposed(self._random(min(wanted, *self._sides)))
        self._squares = summed if squares is None else squares
        self._right = _orthonormal(images)
        self._left = self._product(self._right)

    def run(self) -> Leading:
        if not self._count:  # V is so small that its products are zero
            return Leading(self._left.float(), self._left.new_zeros(0).cpu())
        for _ in range(MOST_BLOCKS):
            values, rotation = self._ritz()
            wanted = self._wanted(values)
            if self._count == self._sides[1]:
                break
            block = self._next_block(values, rotation, wanted)
            if not block.shape[1]:
                break
            kept = (wanted or 0) + OVERSAMPLING
            most = 3 * (wanted or 0) + 8 * OVERSAMPLING
            if wanted is not None and kept < self._count and self._count + block.shape[1] > most:
                self._left, self._right = self._left @ rotation[:, :kept], self._right @ rotation[:, :kept]
            self._right = torch.cat([self._right, block], 1)
            self._left = torch.cat([self._left, self._product(block)], 1)
        values, rotation = self._ritz()
        wanted = self._wanted(values)
        vectors = _orthonormal(self._ritz_left(values, rotation, len(values) if wanted is None else wanted))
        return Leading(vectors.float(), values[: vectors.shape[1]].clamp(min=0).sqrt().cpu())

    @property
    def _count(self) -> int:
        return len(self._right.mT)

    def _random(self, count: int) -> torch.Tensor:
        """Draw random vectors on the CPU, so that they do not depend on the device."""
        drawn = torch.randn(self._sides[0], count, generator=self._generator)
        return drawn.to(self._pair[0].device, torch.float64)

    def _transposed(self, vectors: torch.Tensor) -> tuple[torch.Tensor, float]:
        (images,), squares = transposed_products([self._pair], [vectors.float()])
        return images.double(), float(squares[0])

    def _product(self, vectors: torch.Tensor) -> torch.Tensor:
        return matrix_products([self._pair], [vectors.float()])[0].double()

    def _ritz(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the eigenvalues of YᵀY in descending order, and its eigenvectors as columns."""
        values, vectors = torch.linalg.eigh((self._left.mT @ self._left).cpu())
        return values.flip(0).to(self._left.device), vectors.flip(1).to(self._left.device)

    def _wanted(self, values: torch.Tensor) -> int | None:
        """Return the number of vectors to compute; None if the basis does not hold that many yet."""
        if self._extent.rank is not None:
            return self._extent.rank if self._extent.rank <= len(values) else None
        assert self._extent.energy is not None  # noqa: S101
        goal = self._extent.energy * self._squares * (1 - 1e-6)  # float32 rounding changes the last digits
        reached = (values.cumsum(0) >= goal).nonzero()
        return int(reached[0]) + 1 if len(reached) else None

    def _ritz_left(self, values: torch.Tensor, rotation: torch.Tensor, count: int) -> torch.Tensor:
        """Return the first left Ritz vectors, without those below rounding error."""
        count = min(count, int((values > values[0] * TOLERANCE**2).sum()))
        return self._left @ (rotation[:, :count] / values[:count].sqrt())

    def _next_block(self, values: torch.Tensor, rotation: torch.Tensor, wanted: int | None) -> torch.Tensor:
        """Return new directions: residuals of unconverged vectors, or else random directions."""
        room = self._sides[1] - self._count
        ritz_left = self._ritz_left(values, rotation, self._count if wanted is None else wanted + OVERSAMPLING)
        count = ritz_left.shape[1]
        images, _ = self._transposed(ritz_left)
        # The part inside Z is known: Zᵀ·Vᵀ·U = YᵀU = Q·σ.
        residuals = images - self._right @ (rotation[:, :count] * values[:count].sqrt())
        limit = TOLERANCE * values[0].clamp(min=0).sqrt()
        is_open = residuals.norm(dim=0) > limit
        if wanted is not None and not bool(is_open[:wanted].any()):
            return residuals[:, :0]
        residuals = residuals[:, is_open]
        if not residuals.shape[1]:
            images, _ = self._transposed(self._random(min(2 * OVERSAMPLING, room)))
            rest = _removed(images, self._right)
            residuals = images[:, rest.norm(dim=0) > limit]
        return _orthonormal(residuals, self._right)[:, :room]


def _removed(vectors: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Remove the part inside an orthonormal basis; two passes suffice."""
    for _ in range(2):
        vectors = vectors - basis @ (basis.mT @ vectors)
    return vectors


def _orthonormal(vectors: torch.Tensor, basis: torch.Tensor | None = None) -> torch.Tensor:
    """Return an orthonormal basis of the independent columns, orthogonal to `basis` if given."""
    size = vectors.norm(dim=0)
    vectors = vectors / torch.where(size > 0, size, 1)
    if basis is not None:
        vectors = _removed(vectors, basis)
    orthonormal, triangle = torch.linalg.qr(vectors)
    orthonormal = orthonormal[:, triangle.diagonal().abs() > torch.finfo(torch.float32).eps]
    return orthonormal if basis is None else torch.linalg.qr(_removed(orthonormal, basis))[0]
