"""A model's adapted modules together with their safe subspaces: the penalty and the projection of a training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safelora_fast.defenses.subspace_penalty import penalty
from safelora_fast.errors import PairingError
from safelora_fast.training.adapted import AdaptedModule, adapted_modules
from safelora_fast.training.anatomy import gathered, like

if TYPE_CHECKING:
    from torch import nn

    from safelora_fast.subspace import SafeSubspace


class SafeModules:
    """The adapted modules of a model and U_k of each, on the module's device; those whose V is zero are left out.

    Raises:
        PairingError: an adapted module has no subspace, or one of another shape, or V is zero in all of them.
        SettingsError: an adapter of a kind that cannot be projected.
    """

    def __init__(self, model: nn.Module, subspace: SafeSubspace, *, owner: str) -> None:
        self.modules: list[AdaptedModule] = []
        self._vectors: dict[str, torch.Tensor] = {}
        for module in adapted_modules(model, owner=owner):
            found = subspace.find(module.name)
            shape, given = (module.left.shape[0], module.right.shape[1]), (len(found.left_vectors), found.columns)
            if shape != given:
                raise PairingError(
                    f"{owner}: {module.name} is {shape}, the subspace has {given}: it is of another model"
                )
            if found.rank:
                self.modules.append(module)
                self._vectors[module.name] = torch.from_numpy(found.left_vectors)
        if not self.modules:
            raise PairingError(
                f"{owner}: V = aligned - base is zero in every adapted module: there is no safe subspace"
            )

    def vectors(self, module: AdaptedModule) -> torch.Tensor:
        """U_k [m, k], float32, on the device of the module's factors."""
        device = module.left.device
        if self._vectors[module.name].device != device:
            self._vectors[module.name] = self._vectors[module.name].to(device)
        return self._vectors[module.name]

    def penalties(self) -> list[tuple[str, torch.Tensor]]:
        """(module, ‖(I − P_k)ΔW‖²_F), differentiable, float32 whatever autocast says."""
        result = []
        for module in self.modules:
            with torch.autocast(module.left.device.type, enabled=False):
                left, right = gathered(module.left).float(), gathered(module.right).float()
                result.append((module.name, penalty(left, right, module.scale, self.vectors(module))))
        return result

    def project(self) -> float:
        """B ← P_k·B for every module, in place; returns the lowest cosine of P_k·ΔW and ΔW before (NaN at ΔW = 0)."""
        with torch.no_grad():
            cosines = [self._project_one(module) for module in self.modules]
        stacked = torch.stack([cosine.to(cosines[0].device) for cosine in cosines])
        known = stacked[stacked.isfinite()]
        return float(known.min()) if len(known) else float("nan")

    def _project_one(self, module: AdaptedModule) -> torch.Tensor:
        vectors = self.vectors(module)
        left, right = gathered(module.left).float(), gathered(module.right).float()
        inside = vectors @ (vectors.T @ left)
        gram = right @ right.T
        cosine = (((inside.T @ inside) * gram).sum() / ((left.T @ left) * gram).sum()).sqrt()
        module.left.copy_(like(module.left, inside))
        return cosine
