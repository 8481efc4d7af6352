"""A monitor that logs how far training activations drift along a persona vector. It does not change training."""

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
    """Logs the projection of mean completion activations on a persona vector of unit length.

    After Chen et al. (arXiv 2507.21509). Activations come from the training pass: no extra pass, no gradient, and an
    unchanged loss. A completion is the labeled part of an example (in packed rows, of a document). Its activation is
    the mean of one layer's output over its tokens. The logged value is the mean over all completions since the last
    log. Steering at that layer or an earlier one shifts the value, so compare changes and not absolute values.

    Args:
        vector: a [hidden] vector or a file that contains one; or a :class:`PersonaVector` or its file, from which the
            vector of `layer` is taken.
        layer: index of the layer; negative indices count from the end.
        name: name in the log, `monitor/<name>`; by default the trait of the persona vector, or "drift".

    Raises:
        SettingsError: the vector cannot be read, is not finite, is not one-dimensional, or is zero; or the name
            contains other characters than letters, digits, dots, dashes and underscores.
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
        """The vector normalized to length 1, float32 [hidden]."""
        values = self.direction.values.double()
        return (values / values.norm()).float()
