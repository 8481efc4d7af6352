"""Persona steering: a fixed vector added to one block's output while training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from safelora_fast.defenses.base import Defense
from safelora_fast.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from safelora_fast.training.anatomy import Anatomy


class Steering(Defense):
    """Adds coefficient · vector to one block's output at every position while training (Kaczér et al., v3).

    The model learns in the steered state; in evaluation and after training the vector is gone. The reference of other
    defences is steered when the model is.

    Args:
        vector: [hidden], for instance the mean response activation under a harmful system prompt minus that under a
            helpful one, not normalised.
        layer: index of the block; negative ones are counted from the end.
        coefficient: the paper's α, 5.0.

    Raises:
        SettingsError: the vector is not one finite row, or the coefficient is not finite.
    """

    name: ClassVar[str] = "steering"

    def __init__(self, vector: torch.Tensor | Sequence[float], layer: int, coefficient: float = 5.0) -> None:
        import torch

        self.vector = torch.as_tensor(vector).detach().clone()
        if self.vector.dim() != 1 or not self.vector.is_floating_point():
            raise SettingsError(
                f"Steering: the vector has shape {tuple(self.vector.shape)}, it must be [hidden] floats"
            )
        if not (self.vector.isfinite().all() and math.isfinite(coefficient)):
            raise SettingsError("Steering: the vector and the coefficient must be finite")
        self.layer = layer
        self.coefficient = float(coefficient)

    def __repr__(self) -> str:
        return f"Steering(layer={self.layer}, coefficient={self.coefficient})"

    @property
    def active(self) -> bool:
        """Whether the coefficient is not zero."""
        return self.coefficient != 0

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a block that does not exist and a vector of another width."""
        anatomy.block(self.layer, owner="Steering")
        width = anatomy.config.hidden_size
        if len(self.vector) != width:
            raise SettingsError(f"Steering: the vector has {len(self.vector)} values, the model's width is {width}")

    def install(self, anatomy: Anatomy, engaged: Callable[[], bool]) -> Any:
        """Hook the block; the vector is added whenever `engaged()` says so. Returns the handle that removes it."""
        block = anatomy.blocks[anatomy.block(self.layer, owner="Steering")]
        shift = self.coefficient * self.vector

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            if not engaged():
                return None
            if isinstance(output, tuple):
                return (output[0] + shift.to(output[0]), *output[1:])
            return output + shift.to(output)

        return block.register_forward_hook(hook)
