"""A model's adapted modules together with their safe subspaces: the penalty and the projection of a training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safelora_fast.defenses.subspace_penalty import penalty
from safelora_fast.errors import PairingError
from safelora_fast.training.adapted import AdaptedModule, adapted_modules
from safelora_fast.training.anatomy import gathered
from safelora_fast.training.guard import projection_culprit
from safelora_fast.training.held import held_rows, matching_rows, sum_over_shards, write_rows

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
        self._owner = owner
        self.modules: list[AdaptedModule] = []
        self._vectors: dict[str, torch.Tensor] = {}
        self._held: dict[str, torch.Tensor] = {}
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

    def project(self, step: int) -> float:
        """B ← P_k·B for every module, in place; returns the lowest cosine of P_k·ΔW and ΔW before (NaN at ΔW = 0).

        Where FSDP2 shards B, each process multiplies its own rows with its own rows of U_k; the k×r products UᵀB and the
        r×r Grams BᵀB are summed over the processes, and B is never gathered. Collective there, and with DeepSpeed.

        Args:
            step: optimiser steps made, for messages.

        Raises:
            TrainingError: a B holds NaN or Inf, which the product would spread; nothing has been written then.
        """
        with torch.no_grad(), torch.autocast(self.modules[0].left.device.type, enabled=False):
            partial = [self._partial_products(module) for module in self.modules]
            products = sum_over_shards([module.left for module in self.modules], partial, owner=self._owner)
            finite = torch.stack([product.sum().to(products[0].device) for product in products]).isfinite().tolist()
            if not all(finite):
                raise projection_culprit(self.modules[finite.index(False)].name, step)
            cosines = []
            for module, product in zip(self.modules, products, strict=True):
                basis = self._held_vectors(module)
                inner, gram = product[: basis.shape[1]], product[basis.shape[1] :]
                write_rows(module.left, basis @ inner)
                right = gathered(module.right).float()
                right_gram = right @ right.T
                cosines.append((((inner.T @ inner) * right_gram).sum() / (gram * right_gram).sum()).sqrt())
        stacked = torch.stack([cosine.to(cosines[0].device) for cosine in cosines])
        known = stacked[stacked.isfinite()]
        return float(known.min()) if len(known) else float("nan")

    def _partial_products(self, module: AdaptedModule) -> torch.Tensor:
        """UᵀB above BᵀB [k + r, r], from the rows that this process holds."""
        left = held_rows(module.left)
        return torch.cat([self._held_vectors(module).T @ left, left.T @ left])

    def _held_vectors(self, module: AdaptedModule) -> torch.Tensor:
        """The rows of U_k beside this process's rows of B, on their device."""
        if module.name not in self._held:
            rows = matching_rows(module.left, self._vectors[module.name], owner=self._owner)
            self._held[module.name] = rows.to(module.left.device)
        return self._held[module.name]
