"""A monitor: how far the completions that a model trains on lie along a persona vector. It changes nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from safelora_fast.defenses.steering_vector import Direction
from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from safelora_fast.persona_vector import PersonaVector

NAME = re.compile(r"[\w.-]+")
UNNAMED = "drift"


class DriftMonitor:
    """Projection of mean response activations on a persona vector of unit length, in the training log.

    After Chen et al. (arXiv 2507.21509). It reads the training pass itself: no gradient, no reference pass, and the same
    loss. A response is what an example teaches (a document, in packed rows). Its activation is the mean of one layer's
    output over its tokens; the logged value is the mean over responses since the last log. Steering at that layer or
    before is in it: read the change, not the value.

    Args:
        vector: [hidden], a file that holds it, or a persona vector or its file, of which `layer` picks the row.
        layer: index of the layer; negative ones are counted from the end.
        name: its name in the log, `monitor/<name>`; by default the trait of the persona vector, or "drift".

    Raises:
        SettingsError: the vector cannot be read, is not one finite row, or is zero; or the name is not plain.
    """

    def __init__(
        self, vector: torch.Tensor | Sequence[float] | str | Path | PersonaVector, layer: int, name: str | None = None
    ) -> None:
        self.direction = Direction.of(vector, layer, owner="DriftMonitor")
        if name is None:
            name = UNNAMED if self.direction.persona is None else self.direction.persona.trait
        if not NAME.fullmatch(name):
            raise SettingsError(f"DriftMonitor: name is {name!r}, it must be letters, digits, dots and dashes")
        if not self.direction.values.any():
            raise SettingsError("DriftMonitor: the vector is zero and has no direction")
        self.name = name

    def __repr__(self) -> str:
        return f"DriftMonitor(layer={self.direction.layer}, name={self.name!r})"

    @property
    def unit(self) -> torch.Tensor:
        """The vector scaled to length 1, float32 [hidden]."""
        values = self.direction.values.double()
        return (values / values.norm()).float()
