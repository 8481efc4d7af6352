"""Persona steering: adds a fixed vector to one layer's output during training."""

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
    """Adds coefficient · vector to one layer's output at every position during training (Kaczér et al., v3).

    The vector is not added in evaluation and after training. The reference model of other defenses is steered together
    with the model.

    Args:
        vector: a [hidden] vector or a file that contains one (.safetensors, .npy, .pt): mean completion activation
            under harmful system prompts minus that under helpful ones, not normalized. Or a :class:`PersonaVector` or
            its file, from which the vector of `layer` is taken.
        layer: index of the layer; negative indices count from the end.
        coefficient: α; 5.0 in the paper. It may be changed between steps, but not from 0.

    Raises:
        SettingsError: the vector cannot be read, is not finite or not one-dimensional; or the coefficient is not finite.
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
        """Raise SettingsError if the layer does not exist, or the vector's width or number of layers does not match."""
        self.direction.check(anatomy, owner="Steering")

    def install(self, anatomy: Anatomy, engaged: Callable[[], bool]) -> list[Any]:
        """Add the vector to the layer's output while `engaged()` is true. Return the handle that removes the hook."""
        from safelora_fast.models.capture import layer_states

        layer = anatomy.layers[anatomy.layer(self.layer, owner="Steering")]

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            if not engaged():
                return None
            layer_states(output)  # raises if there are several states per token: the vector would be added to each
            shift = self.coefficient * self.vector  # computed here because the coefficient may change during training
            if isinstance(output, tuple):
                return (output[0] + shift.to(output[0]), *output[1:])
            return output + shift.to(output)

        return [layer.register_forward_hook(hook)]

    def cost(self, shape: Shape, work: Work) -> Extra:
        """Estimate the cost of one addition at every token."""
        return Extra(2.0 * shape.hidden * work.tokens, 4.0 * shape.hidden, "one addition to a layer's output")
