"""The monitors of a model in training: projections of mean response activations, summed until the log reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safelora_fast.errors import SettingsError
from safelora_fast.training.metrics import Sums

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.data.spans import Spans
    from safelora_fast.defenses.drift_monitor import DriftMonitor
    from safelora_fast.models.anatomy import Anatomy
    from safelora_fast.models.capture import Capture

RESPONSES = "responses, by number"  # no name of a monitor has spaces


class Monitors:
    """The monitors of one model, and their sums since they were last read.

    Args:
        monitors: each with a name of its own.
        anatomy: the model's parts.

    Attributes:
        layers: indices of the layers whose outputs are needed.

    Raises:
        SettingsError: two monitors share a name, or one does not fit the model.
    """

    def __init__(self, monitors: Sequence[DriftMonitor], anatomy: Anatomy) -> None:
        names = [monitor.name for monitor in monitors]
        if len(set(names)) != len(names):
            raise SettingsError(f"each monitor needs a name of its own, not {', '.join(names)}")
        for monitor in monitors:
            monitor.direction.check(anatomy, owner="DriftMonitor")
        self._monitors = {
            monitor.name: (anatomy.layer(monitor.direction.layer, owner="DriftMonitor"), monitor.unit)
            for monitor in monitors
        }
        self.layers = sorted({layer for layer, _ in self._monitors.values()})
        self._sums = Sums()
        self.close = self._sums.close

    def observe(self, capture: Capture, spans: Spans) -> None:
        """Add up the projections of one micro-batch; nothing is read off the device.

        Raises:
            SettingsError: the batch has no labels, so its responses are not known.
        """
        weights, responses = response_weights(spans)
        with torch.no_grad():
            for name, (layer, unit) in self._monitors.items():
                along = projections(capture.layers[layer].detach(), unit)
                self._sums.add(name, (along * weights.to(along.device)).sum().to(responses.device))
        self._sums.add(RESPONSES, responses)

    def read(self) -> dict[str, float]:
        """Mean over the responses of all processes since the last call; empty where there were none. Collective."""
        sums = self._sums.read([*self._monitors, RESPONSES])
        responses = sums[RESPONSES]
        return {f"monitor/{name}": sums[name] / responses for name in self._monitors} if responses else {}


def projections(states: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Inner product of every token's state [rows, tokens, hidden] with a vector [hidden]: float64 [rows, tokens].

    Row by row, in float32 without a matrix product: autocast would round that, and a whole copy would cost memory.
    """
    unit = unit.to(states.device)
    return torch.stack([(row.float() * unit).sum(dim=-1) for row in states]).double()


def response_weights(spans: Spans) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight of each token, one over the length of its response or 0 outside of responses; and the number of responses.

    Both are float64. Tokens of a response are those that carry a label themselves, as persona extraction counts them;
    `completion` marks the positions that predict them.

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
