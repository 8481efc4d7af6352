"""Persona steering: a fixed vector added to one layer's output while training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from safelora_fast.defenses.base import Defense
from safelora_fast.defenses.steering_vector import Direction
from safelora_fast.defenses.step_cost import Extra
from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from safelora_fast.defenses.step_cost import Shape, Work
    from safelora_fast.models.anatomy import Anatomy
    from safelora_fast.persona_vector import PersonaVector


class Steering(Defense):
    """Adds coefficient · vector to one layer's output at every position while training (Kaczér et al., v3).

    The model learns in the steered state; in evaluation and after training the vector is gone. The reference model of
    other defenses is steered when the model is.

    Args:
        vector: [hidden], or a file that holds it (.safetensors, .npy, .pt): the mean response activation under harmful
            system prompts minus that under helpful ones, not normalized. Of a :class:`PersonaVector` or its file,
            `layer` picks the row.
        layer: index of the layer; negative ones are counted from the end.
        coefficient: the paper's α, 5.0; it may be changed between steps, but not from 0.

    Raises:
        SettingsError: the vector cannot be read or is not one finite row, or the coefficient is not finite.
    """

    name: ClassVar[str] = "steering"

    def __init__(
        self, vector: torch.Tensor | Sequence[float] | str | Path | PersonaVector, layer: int, coefficient: float = 5.0
    ) -> None:
        self.direction = Direction.of(vector, layer, owner="Steering")
        if not math.isfinite(coefficient):
            raise SettingsError(f"Steering: coefficient is {coefficient}, it must be finite")
        self.coefficient = float(coefficient)

    @property
    def vector(self) -> torch.Tensor:
        """The vector [hidden], without the coefficient."""
        return self.direction.values

    @property
    def layer(self) -> int:
        """Index of the layer."""
        return self.direction.layer

    def __repr__(self) -> str:
        return f"Steering(layer={self.layer}, coefficient={self.coefficient})"

    @property
    def active(self) -> bool:
        """Whether the coefficient is not zero."""
        return self.coefficient != 0

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a layer that does not exist, and a vector of another width or of another number of layers."""
        self.direction.check(anatomy, owner="Steering")

    def install(self, anatomy: Anatomy, engaged: Callable[[], bool]) -> list[Any]:
        """Add the vector to the layer's output while `engaged()`. Returns the handle that stops it."""
        from safelora_fast.models.capture import layer_states

        layer = anatomy.layers[anatomy.layer(self.layer, owner="Steering")]

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            if not engaged():
                return None
            layer_states(output)  # refuses several states per token, to each of which the vector would be added
            shift = self.coefficient * self.vector  # now, for the coefficient may change while training
            if isinstance(output, tuple):
                return (output[0] + shift.to(output[0]), *output[1:])
            return output + shift.to(output)

        return [layer.register_forward_hook(hook)]

    def cost(self, shape: Shape, work: Work) -> Extra:
        """One addition at every token."""
        return Extra(2.0 * shape.hidden * work.tokens, 4.0 * shape.hidden, "one addition to a layer's output")
