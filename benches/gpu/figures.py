"""The metrics of a suite, one per line, each with its aim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@dataclass(frozen=True)
class Figure:
    """One metric of one provider.

    Attributes:
        provider: "ours, triton", or a peer.
        part: what was measured.
        name: unit of the value: "ms", "of a copy", "× torch".
        value: the measured value.
        least: smallest value that reaches the aim.
        most: largest value that reaches the aim.
        host: whether the time includes launches by the host. They are queued behind a pause, except where the operation
            itself waits for the GPU, or where the time that a caller sees is measured.
    """

    provider: str
    part: str
    name: str
    value: float
    least: float | None = None
    most: float | None = None
    host: str = "excluded"

    @property
    def aim(self) -> str:
        """The aim as text, empty if there is none."""
        if self.least is not None:
            return f"≥ {self.least:g}"
        return "" if self.most is None else f"≤ {self.most:g}"

    @property
    def reached(self) -> str:
        """Whether the aim is reached: yes or no; empty if there is none."""
        if not self.aim:
            return ""
        enough = self.least is None or self.value >= self.least
        return "yes" if enough and (self.most is None or self.value <= self.most) else "no"


def agree(what: str, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], tolerance: float) -> None:
    """Stop the run if two providers compute different results: the ratio of their times would be meaningless."""
    for one, other in zip(ours, theirs, strict=True):
        exact = other.detach().double()
        error = float((one.detach().double() - exact).norm() / exact.norm())
        if not error <= tolerance:
            raise SystemExit(f"{what}: results differ by {error:.2g}, more than {tolerance:.2g}: fix that first")
