"""The plan of a projection: matches each adapted module with its weights in both checkpoints.

Names are paired first (checkpoints/pairing.py), so that only the necessary shards of a remote checkpoint are fetched.
Then shapes are compared. All problems are collected before anything is computed.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from safelora_fast.checkpoints.experts import assign, expert_factors, whole
from safelora_fast.checkpoints.geometry import VOCABULARY, ExpertWeights, matrix_of
from safelora_fast.checkpoints.pairing import TensorNames
from safelora_fast.checkpoints.tensor_names import canonical, tower_of
from safelora_fast.errors import PairingError
from safelora_fast.projection.jobs import AdapterFactors, Group, Plan, Problems, collect, meet, plan_groups, raise_first

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from safelora_fast.checkpoints.adapter import Adapter, LoraModule
    from safelora_fast.checkpoints.sources import Checkpoint
    from safelora_fast.checkpoints.tensor_names import Piece

Weight: TypeAlias = "tuple[Piece, ...] | ExpertWeights"


@dataclass(frozen=True)
class _Unit:
    """A module of an adapter (or all experts of a module), and the location of its weights in both checkpoints."""

    index: int
    adapter: Adapter
    names: tuple[TensorNames, TensorNames]
    modules: tuple[LoraModule, ...]
    weights: tuple[Weight, Weight]

    def groups(self) -> list[Group]:
        """Return the group of the module, or one group per expert.

        Raises:
            PairingError: the two weights and the update do not match.
        """
        aligned, base = self.weights
        if isinstance(aligned, ExpertWeights) and isinstance(base, ExpertWeights):
            return self._expert_groups(aligned, base)
        (module,) = self.modules
        lora_b, lora_a = whole(module.lora_b_key, module.lora_b_shape), whole(module.lora_a_key, module.lora_a_shape)
        aligned_matrix, base_matrix = (
            matrix_of(
                name,
                pieces,  # type: ignore[arg-type]
                module.name,
                (lora_b.rows, lora_a.cols),
                embedding=module.kind == "embedding",
                fan_in_fan_out=bool(self.adapter.config.get("fan_in_fan_out")),
            )
            for name, pieces in zip(self.names, self.weights, strict=True)
        )
        return [meet(module.name, aligned_matrix, base_matrix, AdapterFactors(self.index, module, lora_b, lora_a))]

    def _expert_groups(self, ours: ExpertWeights, theirs: ExpertWeights) -> list[Group]:
        names, groups = self.names, []
        version, model_type = self.adapter.config.get("peft_version"), names[0].setting("model_type")
        for module, parameter, swapped in assign(self.modules, ours.shapes(names[0]), model_type, version):
            aligned, base = ours.matrices(names[0], parameter), theirs.matrices(names[1], parameter)
            if len(aligned) != len(base):
                raise PairingError(
                    f"{module.name}: {parameter} has {len(aligned)} experts in the aligned model, {len(base)} in the base"
                )
            if module.rank % len(aligned):
                raise PairingError(
                    f"{module.name}: the factors' common side is {module.rank}, which {len(aligned)} experts cannot share"
                )
            is_flat = ours.flat(names[0], parameter)
            for expert, pair in enumerate(zip(aligned, base, strict=True)):
                factors = expert_factors(module, expert, len(aligned), swapped=swapped)
                name = f"{module.name}.{parameter}" if is_flat else f"{module.name}.{expert}.{parameter}"
                groups.append(meet(name, *pair, AdapterFactors(self.index, module, *factors)))
        return groups


def plan_projection(adapters: Sequence[Adapter], aligned: Checkpoint, base: Checkpoint) -> Plan:
    """Pair each module of the adapters with its tensors in both checkpoints.

    Args:
        adapters: any number; modules with the same tensors share one job.
        aligned: the model that the adapters were trained on.
        base: the model before alignment; names, fusion and dtypes of its tensors may differ.

    Raises:
        PairingError: a module has no unique counterpart of the right shape in both checkpoints.
        CheckpointError: a checkpoint is quantized.
    """
    both = TensorNames(aligned, "aligned"), TensorNames(base, "base")
    problems: Problems = []
    units: list[_Unit] = []
    for index, adapter in enumerate(adapters):
        tower = tower_of(adapter.config)
        names = both[0].within(tower), both[1].within(tower)
        nested: dict[object, list[LoraModule]] = defaultdict(list)
        for number, module in enumerate(adapter.modules):
            nested[module.name if module.kind == "parameter" else number].append(module)
        for modules in nested.values():
            collect(problems, modules[0].name, units, lambda: [_locate(index, adapter, names, modules)])  # noqa: B023
    raise_first(problems, len(units))
    for checkpoint, side in ((aligned, 0), (base, 1)):
        checkpoint.require(sorted({name for unit in units for name in _tensors(unit.weights[side])}))
    groups: dict[object, Group] = {}
    for unit in units:
        found: list[Group] = []
        collect(problems, unit.modules[0].name, found, unit.groups)
        for group in found:
            _join(groups, group, problems)
    raise_first(problems, len(groups))
    return plan_groups(groups.values(), adapters)


def _locate(index: int, adapter: Adapter, names: tuple[TensorNames, TensorNames], modules: list[LoraModule]) -> _Unit:
    def weight(name: TensorNames) -> Weight:
        if modules[0].kind == "parameter":
            return ExpertWeights.locate(name, modules)
        return name.weight(modules[0].name)

    return _Unit(index, adapter, names, tuple(modules), (weight(names[0]), weight(names[1])))


def _tensors(located: Weight) -> Iterable[str]:
    return located.tensors() if isinstance(located, ExpertWeights) else (piece.tensor for piece in located)


def _join(groups: dict[object, Group], group: Group, problems: Problems) -> None:
    """Merge a group into an existing group with the same V, or add it."""
    known = groups.setdefault(group.identity, group)
    if known is group:
        return
    ours = group.factors[0]
    for other in known.factors:
        if other.adapter == ours.adapter and canonical(group.name) in VOCABULARY:
            groups[group.identity, group.name] = group  # tied weights: each module has its own update
            return
        if other.adapter == ours.adapter:
            both = f"{other.module.lora_b_key} and {ours.module.lora_b_key}"
            problem = PairingError(f"{group.name}: the adapter's {both} both belong to {group.aligned[0].tensor}")
            problems.append((ours.module.name, problem))
            return
    known.factors.extend(group.factors)
