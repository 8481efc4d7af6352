"""Where a model's hidden states lie along persona vectors, and along its own direction of misaligned answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from safelora_fast.data.tokens import IGNORED_LABEL
from safelora_fast.models.anatomy import dissect
from safelora_fast.models.reference_pass import evaluation_mode
from safelora_fast.models.token_means import token_means
from safelora_fast.scoring.sequences import batches_by_length

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from safelora_fast.defenses.drift_monitor import DriftMonitor
    from safelora_fast.scoring.sequences import Labelled


@dataclass(frozen=True)
class TraitReading:
    """The states of one model.

    Attributes:
        prompts: by monitor, the projection of the last prompt token's state on the vector of unit length, [pairs].
        auroc: by monitor, the probability that a misaligned answer's mean state lies further along the vector than an
            aligned one's. Under "direction": the same on held-out pairs, for the direction that the reference model's
            answers of the other pairs give.
        direction: mean projection of the held-out pairs' answers on that direction of unit length.
    """

    prompts: dict[str, np.ndarray]
    auroc: dict[str, float]
    direction: float


class TraitProbe:
    """Reads states at the layers of monitors, over pairs of answers. The first reading fixes the reference's direction.

    The direction is the mean state of the misaligned answers minus that of the aligned ones, at the first monitor's layer,
    over the pairs of every second theme. It is tested on the pairs of the others.

    Args:
        examples: two for each pair, the aligned answer first.
        themes: the theme of each pair.
        monitors: the traits and layers, at least one.
        tokens_per_batch: maximum number of tokens in a batch, padding included.
    """

    def __init__(
        self,
        examples: Sequence[Labelled],
        themes: Sequence[str],
        monitors: Sequence[DriftMonitor],
        *,
        tokens_per_batch: int,
    ) -> None:
        self._sequences = [example.ids for example in examples]
        self._places = [
            [place for place, label in enumerate(example.labels) if label != IGNORED_LABEL] for example in examples
        ]
        names = list(dict.fromkeys(themes))
        groups = [names.index(theme) for theme in themes] if len(names) > 1 else list(range(len(themes)))
        self._held_out = np.array([group % 2 == 1 for group in groups])
        self._monitors = monitors
        self._tokens = tokens_per_batch
        self._direction: np.ndarray | None = None

    def read(self, model: nn.Module) -> TraitReading:
        """Read the states of a model.

        Raises:
            SettingsError: a monitor does not fit the model.
        """
        anatomy = dissect(model)
        for monitor in self._monitors:
            monitor.direction.check(anatomy, owner=f"monitor {monitor.name}")
        layers = [monitor.direction.layer % anatomy.depth for monitor in self._monitors]
        distinct = list(dict.fromkeys(layers))
        starts = [places[0] for places in self._places[::2]]
        before = [ids[:start] for ids, start in zip(self._sequences[::2], starts, strict=True)]
        prompts = self._means(model, before, [[start - 1] for start in starts], distinct)  # [pairs, layers, H]
        answers = self._means(model, self._sequences, self._places, distinct)  # [2 · pairs, layers, H]
        shifts, auroc = {}, {}
        for monitor, layer in zip(self._monitors, layers, strict=True):
            unit = monitor.unit.double().cpu().numpy()
            shifts[monitor.name] = prompts[:, distinct.index(layer)] @ unit
            along = answers[:, distinct.index(layer)] @ unit
            auroc[monitor.name] = area(along[1::2], along[::2])
        states = answers[:, 0]
        if self._direction is None:
            difference = (states[1::2] - states[::2])[~self._held_out].mean(0)
            self._direction = difference / max(float(np.linalg.norm(difference)), 1e-30)
        along = (states @ self._direction).reshape(-1, 2)[self._held_out]
        auroc["direction"] = area(along[:, 1], along[:, 0])
        return TraitReading(shifts, auroc, float(along.mean()))

    def _means(
        self,
        model: nn.Module,
        sequences: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]],
        layers: Sequence[int],
    ) -> np.ndarray:
        anatomy = dissect(model)
        found: dict[int, torch.Tensor] = {}
        with evaluation_mode(model):
            for batch in batches_by_length([len(ids) for ids in sequences], self._tokens):
                ids, where = [sequences[index] for index in batch], [places[index] for index in batch]
                found.update(zip(batch, token_means(anatomy, ids, where, layers, 0).double().cpu(), strict=True))
        means: np.ndarray = torch.stack([found[index] for index in range(len(sequences))]).numpy()
        return means


def area(higher: np.ndarray, lower: np.ndarray) -> float:
    """Return the AUROC: the share of all couples in which the first value is above the second; ties count half."""
    differences = higher[:, None] - lower[None, :]
    return float(((differences > 0) + 0.5 * (differences == 0)).mean())
