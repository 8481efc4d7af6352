"""What a suite gives: figures, one a line, each beside the aim that it is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@dataclass(frozen=True)
class Figure:
    """One figure of one provider.

    Attributes:
        provider: whose it is: "ours, triton", or a peer.
        part: what was done.
        name: what the value is: "ms", "of a copy", "× torch".
        value: the figure.
        least: what it should be at least.
        most: what it should be at most.
    """

    provider: str
    part: str
    name: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def aim(self) -> str:
        """The aim in words, empty where there is none."""
        if self.least is not None:
            return f"≥ {self.least:g}"
        return "" if self.most is None else f"≤ {self.most:g}"

    @property
    def reached(self) -> str:
        """Whether the aim is reached: yes or no; empty where there is none."""
        if not self.aim:
            return ""
        enough = self.least is None or self.value >= self.least
        return "yes" if enough and (self.most is None or self.value <= self.most) else "no"


def agree(what: str, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], tolerance: float) -> None:
    """Stop the run where two providers do not compute the same: a ratio of their times would mean nothing."""
    for one, other in zip(ours, theirs, strict=True):
        exact = other.detach().double()
        error = float((one.detach().double() - exact).norm() / exact.norm())
        if not error <= tolerance:
            raise SystemExit(f"{what}: results differ by {error:.2g}, more than {tolerance:.2g}: fix that first")
