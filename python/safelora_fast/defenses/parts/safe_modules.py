"""A model's adapted modules with their safe subspaces: computes the penalty, and projects after a training step."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from safelora_fast.checkpoints.tensor_names import tower_of_class
from safelora_fast.defenses.base import Attached
from safelora_fast.defenses.parts.grouped_penalties import is_grouped, subspace_penalties, subspace_penalty
from safelora_fast.defenses.parts.grouped_projection import GroupedProjection, lowest_cosine
from safelora_fast.errors import PairingError, TrainingError
from safelora_fast.models.anatomy import gathered, unwrap
from safelora_fast.models.lora_factors import AdaptedModule, adapted_modules
from safelora_fast.models.shards import held_rows, is_whole, local_rows, matching_rows, sum_over_shards, write_rows
from safelora_fast.ops.subspace_projection import OP, matrix_products, transposed_products

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

    from safelora_fast.subspace.safe_subspace import SafeSubspace


class SafeModules(Attached):
    """The adapted modules of a model with their U_k, each on the module's device.

    Modules whose V is zero and modules matched by `exclude` are left out.

    A bias of lora_B shifts the module's output like a column of ΔW. It is therefore treated as a separate module of the
    same name, with B = bias [m, 1] and A = 1.

    Raises:
        PairingError: an adapted module has no subspace, or one of another shape; or V is zero in all modules.
        SettingsError: the adapter type cannot be projected.
    """

    def __init__(self, model: nn.Module, subspace: SafeSubspace, *, owner: str, exclude: Sequence[str] = ()) -> None:
        self._owner = owner
        self.modules: list[AdaptedModule] = []
        self._vectors: dict[str, torch.Tensor] = {}
        self._held: dict[str, torch.Tensor] = {}
        self._prepared: tuple[Any, list[torch.Tensor], list[tuple[list[int], GroupedProjection]] | None] | None = None
        model = unwrap(model)
        for module in adapted_modules(model, owner=owner, exclude=exclude):
            found = subspace.find(module.name, tower_of_class(type(model).__name__))
            shape, given = (module.lora_b.shape[0], module.lora_a.shape[1]), (len(found.left_vectors), found.columns)
            if shape != given:
                raise PairingError(
                    f"{owner}: {module.name} is {shape}, the subspace has {given}: it is of another model, or exclude "
                    f"this module with exclude=[{module.name.rpartition('.')[2]!r}]"
                )
            if found.rank:
                self.modules.append(module)
                if module.bias is not None:
                    self.modules.append(
                        replace(module, lora_b=module.bias, lora_a=module.bias.new_ones(1, 1), bias=None)
                    )
                self._vectors[module.name] = torch.from_numpy(found.left_vectors)
        if not self.modules:
            raise PairingError(
                f"{owner}: V = aligned - base is zero in every adapted module: there is no safe subspace"
            )

    def factors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Return (module, lora_B) of every module."""
        return [(module.name, module.lora_b) for module in self.modules]

    def vectors(self, module: AdaptedModule) -> torch.Tensor:
        """Return U_k [m, k] of a module, float32, on the device of its lora_B."""
        device = module.lora_b.device
        if self._vectors[module.name].device != device:
            self._vectors[module.name] = self._vectors[module.name].to(device)
        return self._vectors[module.name]

    def penalties(self) -> list[tuple[str, torch.Tensor]]:
        """Return (module, ‖(I − P_k)ΔW‖²_F) of every module, differentiable, in float32 even under autocast."""
        with torch.autocast(self.modules[0].lora_b.device.type, enabled=False):
            lefts = [_matrix(gathered(module.lora_b).float()) for module in self.modules]
            rights = [
                gathered(module.lora_a).float().to(left.device)
                for module, left in zip(self.modules, lefts, strict=True)
            ]
            bases, scales = [self.vectors(module) for module in self.modules], [module.scale for module in self.modules]
            values = _per_device(_penalties, lefts, rights, scales, bases)
        return [(module.name, value) for module, value in zip(self.modules, values, strict=True)]

    def project(self, step: int, copies: Callable[[torch.Tensor], Iterable[torch.Tensor]] | None = None) -> float:
        """Project every module in place, B ← P_k·B. Return the lowest cosine of P_k·ΔW and ΔW (NaN if all ΔW are 0).

        If FSDP2 shards B, each process multiplies its rows of B with the matching rows of U_k. The [k, r] products UᵀB
        and the [r, r] Grams BᵀB are summed over processes; B is never gathered. Collective under FSDP2 and DeepSpeed.

        Args:
            step: optimizer steps made, for messages.
            copies: returns tensors from which the optimizer may recompute a parameter; they are projected too.

        Raises:
            TrainingError: a B holds NaN or Inf, which the product would spread; no weight has been changed.
        """
        modules = list(self.modules)
        if copies is not None:
            modules += [replace(module, lora_b=copy) for module in self.modules for copy in copies(module.lora_b)]
        with torch.no_grad(), torch.autocast(self.modules[0].lora_b.device.type, enabled=False):
            together = self._grouped(modules)
            cosines = (
                self._project_each(modules, step)
                if together is None
                else self._project_together(modules, together, step)
            )
        lowest = torch.stack([cosine.to(cosines[0].device) for cosine in cosines])
        known = lowest[lowest.isfinite()]
        return float(known.min()) if len(known) else float("nan")

    def _project_each(self, modules: list[AdaptedModule], step: int) -> list[torch.Tensor]:
        """`project` for shards, for copies of DeepSpeed, and for the CPU; return the lowest cosine of each device."""
        lefts = [_matrix(held_rows(module.lora_b)) for module in modules]
        bases = [self._held_vectors(module) for module in modules]
        inners, grams = self._summed_products(modules, bases, lefts)
        self._check_finite(modules, [*inners, *grams], step)
        for module, product in zip(modules, _per_device(matrix_products, bases, inners), strict=True):
            write_rows(module.lora_b, product if module.lora_b.dim() > 1 else product.squeeze(1))
        cosines: list[torch.Tensor] = []
        for ours in _by_device(lefts[: len(self.modules)]):
            inner = [inners[index] for index in ours]
            flipped = [gathered(modules[index].lora_a).float().to(lefts[index].device).mT for index in ours]
            found, _ = transposed_products([*inner, *flipped], [*inner, *flipped])
            cosines.append(_lowest(found[: len(inner)], [grams[index] for index in ours], found[len(inner) :]))
        return cosines

    def _grouped(self, modules: list[AdaptedModule]) -> list[tuple[list[int], GroupedProjection]] | None:
        """Return the prepared projection of each device's modules (by index), or None: see `_project_each`.

        It is made anew when a tensor has been replaced or has moved.
        """
        lora_bs = [module.lora_b for module in modules]
        tensors = [*lora_bs, *(module.lora_a for module in self.modules)]
        if not is_whole(tensors):
            return None
        found = (
            OP.choose(lora_bs[:1]).name,
            [tensor.data_ptr() for tensor in tensors],
            [tensor.numel() for tensor in tensors],
        )
        kept = self._prepared
        if kept is None or found != kept[0] or not all(map(operator.is_, tensors, kept[1])):
            kept = self._prepared = found, tensors, self._prepare(modules)
        return kept[2]

    def _prepare(self, modules: list[AdaptedModule]) -> list[tuple[list[int], GroupedProjection]] | None:
        if not is_grouped([module.lora_b for module in modules]):
            return None
        count, prepared = len(self.modules), []
        for ours in _by_device([module.lora_b for module in modules]):
            alone = sorted((index for index in ours if index < count), key=lambda index: modules[index].lora_a.shape)
            chosen = [*alone, *(index for index in ours if index >= count)]
            lora_as = [modules[index].lora_a.detach() for index in alone]
            lora_bs = [_matrix(modules[index].lora_b.detach()) for index in chosen]
            if not alone or any(lora_a.device != lora_bs[0].device for lora_a in lora_as):
                return None
            grouped = GroupedProjection.of([self._held_vectors(modules[index]) for index in chosen], lora_bs, lora_as)
            if grouped is None:
                return None
            prepared.append((chosen, grouped))
        return prepared

    def _project_together(
        self, modules: list[AdaptedModule], together: list[tuple[list[int], GroupedProjection]], step: int
    ) -> list[torch.Tensor]:
        for chosen, grouped in together:
            bad = grouped.first_not_finite()
            if bad is not None:
                raise _not_finite(modules[chosen[bad]], step)
        for _, grouped in together:
            grouped.write()
        return [grouped.lowest_cosine() for _, grouped in together]

    def norms(self) -> torch.Tensor:
        """Return ‖B‖_F of this process's shard of every module, on one device. Used to notice changed weights."""
        held = [local_rows(module.lora_b).detach().float() for module in self.modules]
        found = _per_device(lambda rows: list(torch._foreach_norm(rows)), held)
        return torch.stack([norm.to(found[0].device) for norm in found])

    def outside(self) -> float:
        """Return the largest finite ‖B − P_k·B‖ / ‖B‖, in units of the rounding of B's dtype. Collective like `project`."""
        with torch.no_grad(), torch.autocast(self.modules[0].lora_b.device.type, enabled=False):
            lefts = [_matrix(held_rows(module.lora_b)) for module in self.modules]
            bases = [self._held_vectors(module) for module in self.modules]
            inners, grams = self._summed_products(self.modules, bases, lefts)
            products = _per_device(matrix_products, bases, inners)
            rests = [(left - product).square().sum() for left, product in zip(lefts, products, strict=True)]
            summed = sum_over_shards([module.lora_b for module in self.modules], rests, owner=self._owner)
        shares = [
            float(rest.sqrt() / gram.trace().sqrt().clamp(min=torch.finfo(torch.float32).tiny))
            / torch.finfo(module.lora_b.dtype).eps
            for rest, gram, module in zip(summed, grams, self.modules, strict=True)
        ]
        return max((share for share in shares if math.isfinite(share)), default=0.0)

    def _summed_products(
        self, modules: list[AdaptedModule], bases: list[torch.Tensor], lefts: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """UᵀB [k, r] and BᵀB [r, r] of every module, from the rows of all processes."""
        partial = _per_device(_inner_products, lefts, bases)
        count, parameters = len(lefts), [module.lora_b for module in modules]
        products = sum_over_shards(
            [*parameters, *parameters], [part[which] for which in (0, 1) for part in partial], owner=self._owner
        )
        return products[:count], products[count:]

    def _check_finite(self, modules: list[AdaptedModule], products: list[torch.Tensor], step: int) -> None:
        if torch.nn.utils.get_total_norm(products).isfinite():
            return
        for place, product in enumerate(products):
            if not product.isfinite().all():
                raise _not_finite(modules[place % len(modules)], step)

    def _held_vectors(self, module: AdaptedModule) -> torch.Tensor:
        """The rows of U_k that match this process's shard of B, on the device of B."""
        device, held = module.lora_b.device, self._held.get(module.name)
        if held is None or held.device != device:  # the model may move between steps
            rows = matching_rows(module.lora_b, self._vectors[module.name], owner=self._owner)
            held = self._held[module.name] = rows.to(device)
        return held


def _not_finite(module: AdaptedModule, step: int) -> TrainingError:
    return TrainingError(
        f"defense safelora is not finite after optimizer step {step}: lora_B of module {module.name} holds NaN or Inf; "
        "lower the learning rate, or clip the gradients"
    )


def _matrix(factor: torch.Tensor) -> torch.Tensor:
    """Return lora_B unchanged, or a bias as a column [m, 1]."""
    return factor if factor.dim() > 1 else factor[:, None]


def _penalties(
    lefts: list[torch.Tensor], rights: list[torch.Tensor], scales: list[float], bases: list[torch.Tensor]
) -> list[torch.Tensor]:
    if is_grouped([*bases, *lefts, *rights]):
        return subspace_penalties(bases, lefts, rights, scales)
    return [subspace_penalty(*parts) for parts in zip(lefts, rights, scales, bases, strict=True)]


def _inner_products(lefts: list[torch.Tensor], bases: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(UᵀB, BᵀB) of every module, computed in one call."""
    found, _ = transposed_products([*bases, *lefts], [*lefts, *lefts])
    return list(zip(found[: len(lefts)], found[len(lefts) :], strict=True))


def _per_device(function: Callable[..., list[Any]], tensors: list[torch.Tensor], *others: list[Any]) -> list[Any]:
    """Call a function of lists once per device, and return its results in the order of `tensors`."""
    found: dict[int, Any] = {}
    for chosen in _by_device(tensors):
        results = function(*([column[index] for index in chosen] for column in (tensors, *others)))
        found.update(zip(chosen, results, strict=True))
    return [found[index] for index in range(len(tensors))]


def _by_device(tensors: list[torch.Tensor]) -> list[list[int]]:
    """Indices of the tensors, grouped by device."""
    groups: dict[torch.device, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        groups[tensor.device].append(index)
    return list(groups.values())


def _lowest(inner: list[torch.Tensor], left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
    """The lowest cosine of P_k·B·A and B·A, from (UᵀB)ᵀ(UᵀB), BᵀB and AAᵀ; Inf if no cosine is finite."""
    lowest = torch.full((), torch.inf, device=inner[0].device)
    for rank in {len(gram) for gram in inner}:
        chosen = [index for index, gram in enumerate(inner) if len(gram) == rank]
        projected, whole, rights = (torch.stack([grams[index] for index in chosen]) for grams in (inner, left, right))
        lowest = torch.minimum(lowest, lowest_cosine(projected, whole, rights))
    return lowest
