"""The monitors of a model in training: projections of mean response activations, summed until the log reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safelora_fast.errors import SettingsError
from safelora_fast.models.distributed import sum_over_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.data.spans import Spans
    from safelora_fast.defenses.drift_monitor import DriftMonitor
    from safelora_fast.models.anatomy import Anatomy
    from safelora_fast.models.capture import Capture


class Drift:
    """The monitors of one model, and their sums since they were last read.

    Args:
        monitors: each with a name of its own.
        anatomy: the model's parts.

    Raises:
        SettingsError: two monitors share a name, or one does not fit the model.
    """

    def __init__(self, monitors: Sequence[DriftMonitor], anatomy: Anatomy) -> None:
        self._names = [monitor.name for monitor in monitors]
        if len(set(self._names)) != len(self._names):
            raise SettingsError(f"each monitor needs a name of its own, not {', '.join(self._names)}")
        for monitor in monitors:
            monitor.direction.check(anatomy, owner="DriftMonitor")
        self._blocks = [anatomy.block(monitor.direction.layer, owner="DriftMonitor") for monitor in monitors]
        self._units = [monitor.unit for monitor in monitors]
        self._sums: torch.Tensor | None = None
        self._pending: torch.Tensor | None = None  # of the step that is coming, which may be left out

    @property
    def blocks(self) -> list[int]:
        """Indices of the blocks whose outputs are needed."""
        return sorted(set(self._blocks))

    def observe(self, capture: Capture, spans: Spans) -> None:
        """Add up the projections of one micro-batch; nothing is read off the device.

        Raises:
            SettingsError: the batch has no labels, so that its responses cannot be told.
        """
        weights, responses = response_weights(spans)
        found = []
        with torch.no_grad():
            for block, unit in zip(self._blocks, self._units, strict=True):
                along = projections(capture.blocks[block].detach(), unit)
                found.append((along * weights.to(along.device)).sum().to(responses.device))
            sums = torch.stack([*found, responses])
        self._pending = sums if self._pending is None else self._pending + sums

    def close(self, *, made: bool) -> None:
        """A step has been made, and its micro-batches count; or it was left out, and they are forgotten."""
        if made and self._pending is not None:
            self._sums = self._pending if self._sums is None else self._sums + self._pending
        self._pending = None

    def read(self) -> dict[str, float]:
        """Mean over the responses of all processes since the last call; empty where there were none. Collective."""
        self.close(made=True)
        sums = torch.zeros(len(self._names) + 1) if self._sums is None else self._sums
        *totals, responses = sum_over_ranks(sums.tolist(), sums.device)
        self._sums = None
        if not responses:
            return {}
        return {f"monitor/{name}": total / responses for name, total in zip(self._names, totals, strict=True)}


def projections(states: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Inner product of every token's state [rows, tokens, hidden] with a vector [hidden]: float64 [rows, tokens].

    Row by row, in float32 without a matrix product: autocast would round that, and a whole copy would cost memory.
    """
    unit = unit.to(states.device)
    return torch.stack([(row.float() * unit).sum(dim=-1) for row in states]).double()


def response_weights(spans: Spans) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token one over the length of its response, 0 outside of responses; and the number of responses, float64.

    Tokens of a response are those that carry a label themselves, as persona extraction counts them; `completion` marks
    the positions that predict them.

    Raises:
        SettingsError: the batch has no labels.
    """
    if spans.completion is None:
        raise SettingsError("DriftMonitor: the batch has no labels, so its responses cannot be told")
    answers = torch.zeros_like(spans.completion)
    answers[:, 1:] = spans.completion[:, :-1]
    rows, tokens = answers.shape
    index = torch.arange(rows, device=answers.device)[:, None].expand(rows, tokens) * (tokens + 1)
    if spans.segments is not None:
        index = index + spans.segments
    flat, index = answers.flatten().double(), index.flatten()
    lengths = torch.zeros(rows * (tokens + 1), dtype=torch.float64, device=answers.device).scatter_add(0, index, flat)
    weights = flat / lengths[index].clamp(min=1)
    return weights.view(rows, tokens), (lengths > 0).sum().double()
