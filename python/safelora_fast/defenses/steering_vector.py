"""The vector used by steering and by the drift monitor, read from a tensor, a file, or a persona vector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from safelora_fast.errors import SettingsError
from safelora_fast.files.argument_checks import whole_number
from safelora_fast.files.json_reader import check_regular
from safelora_fast.persona_vector import FILE, PersonaVector

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from safelora_fast.models.anatomy import Anatomy

VectorSource: TypeAlias = "torch.Tensor | Sequence[float] | str | Path | PersonaVector"


@dataclass(frozen=True)
class Direction:
    """A vector at one layer's output.

    Attributes:
        values: [hidden], finite floats.
        layer: index of the layer; negative indices count from the end.
        persona: the persona vector that it was taken from, if any.
    """

    values: torch.Tensor
    layer: int
    persona: PersonaVector | None

    @classmethod
    def of(cls, vector: VectorSource, layer: int, *, owner: str) -> Direction:
        """Create the direction from user input.

        Args:
            vector: [hidden] floats or a file that contains them; or a persona vector or its file, from which the vector
                of `layer` is taken.
            layer: index of the layer; negative indices count from the end.
            owner: name of the defense or monitor, for messages.

        Raises:
            SettingsError: the file cannot be read, the vector is not finite or not one-dimensional, the layer is not a
                whole number, or the persona vector has no such layer.
        """
        import torch

        layer = whole_number(f"{owner}: layer", layer)  # PersonaVector.suggestion may be None
        if isinstance(vector, str | Path):
            vector = read_vector(vector)
        persona = vector if isinstance(vector, PersonaVector) else None
        if persona is not None:
            if not -persona.blocks <= layer < persona.blocks:
                raise SettingsError(
                    f"{owner}: layer {layer} does not exist, {persona.name} has vectors of {persona.blocks} layers"
                )
            vector = torch.from_numpy(persona.vectors[layer])
        values = torch.as_tensor(vector).detach().clone()
        if values.dim() != 1 or not values.is_floating_point():
            raise SettingsError(f"{owner}: the vector has shape {tuple(values.shape)}, it must be [hidden] floats")
        if not values.isfinite().all():
            raise SettingsError(f"{owner}: the vector must be finite")
        return cls(values, layer, persona)

    def check(self, anatomy: Anatomy, *, owner: str) -> None:
        """Raise SettingsError unless the model has the layer, the vector's width, and the persona vector's number of layers.

        Raises:
            SettingsError: names both values.
        """
        if self.persona is not None and self.persona.blocks != anatomy.depth:
            raise SettingsError(
                f"{owner}: {self.persona.name} has vectors of {self.persona.blocks} layers, the model has {anatomy.depth}: it "
                "was extracted from another model"
            )
        anatomy.layer(self.layer, owner=owner)
        width = anatomy.config.hidden_size
        if len(self.values) != width:
            which = "the vector" if self.persona is None else self.persona.name
            raise SettingsError(f"{owner}: {which} has {len(self.values)} values, the model's width is {width}")


def read_vector(file: str | Path) -> torch.Tensor | PersonaVector:
    """Read a persona vector, or the only tensor of a .safetensors, .npy or .pt file.

    A .pt file is loaded with `weights_only=True`, so no code in it runs.

    Raises:
        SettingsError: the file cannot be read, or does not contain exactly one tensor.
    """
    import torch

    try:
        found = _read(Path(file))
    except Exception as error:  # a damaged pickle may raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[0] if lines else type(error).__name__
        raise SettingsError(f"{file}: the vector cannot be read: {why}") from error
    if not isinstance(found, torch.Tensor | PersonaVector):
        raise SettingsError(f"{file}: holds no single tensor; save the vector alone")
    return found


def _read(path: Path) -> Any:
    import numpy as np
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    check_regular(path)
    if path.suffix == ".safetensors":
        with safe_open(path, framework="numpy") as file:
            if FILE.format in (file.metadata() or {}):
                return PersonaVector.load(path)
        tensors = list(load_file(path).values())
        return tensors[0] if len(tensors) == 1 else None
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path, allow_pickle=False))
    if path.suffix in {".pt", ".pth"}:
        return torch.load(path, map_location="cpu", weights_only=True)
    raise ValueError(f"{path.suffix or 'no suffix'}: give .safetensors, .npy or .pt")
