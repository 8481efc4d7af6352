"""The monitors of a model in training: sums of projections of mean completion activations, read for each log."""

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

RESPONSES = "responses, by number"  # cannot be a monitor's name, because it has spaces


class Monitors:
    """The monitors of one model, and their sums since they were last read.

    Args:
        monitors: the monitors, with distinct names.
        anatomy: parts of the model.

    Attributes:
        layers: indices of the layers whose outputs are needed.

    Raises:
        SettingsError: two monitors share a name, or one does not match the model.
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
        """Add the projections of one micro-batch, without a device synchronization.

        Raises:
            SettingsError: the batch has no labels, so its completions are not known.
        """
        weights, responses = response_weights(spans)
        with torch.no_grad():
            for name, (layer, unit) in self._monitors.items():
                along = projections(capture.layers[layer].detach(), unit)
                self._sums.add(name, (along * weights.to(along.device)).sum().to(responses.device))
        self._sums.add(RESPONSES, responses)

    def read(self) -> dict[str, float]:
        """Return means over the completions of all processes since the last call; empty if there were none. Collective."""
        sums = self._sums.read([*self._monitors, RESPONSES])
        responses = sums[RESPONSES]
        return {f"monitor/{name}": sums[name] / responses for name in self._monitors} if responses else {}


def projections(states: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Return the inner product of every token's state [rows, tokens, hidden] with `unit` [hidden]: float64 [rows, tokens].

    Computed in float32 one row at a time, to avoid a float32 copy of all states. There is no matrix product, because
    autocast would run it in lower precision.
    """
    unit = unit.to(states.device)
    return torch.stack([(row.float() * unit).sum(dim=-1) for row in states]).double()


def response_weights(spans: Spans) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight of each token and the number of completions, both float64.

    The weight is 1 / length of the completion for its tokens, and 0 for other tokens. A completion consists of the
    labeled tokens, as in persona extraction. (`spans.completion` marks the positions that predict them.)

    Raises:
        SettingsError: the batch has no labels.
    """
    if spans.completion is None:
        raise SettingsError("DriftMonitor: the batch has no labels, so its completions cannot be found")
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
