"""The plan of a projection: for every adapted module, which bytes of both checkpoints meet which factors.

Names are settled first (checkpoints/pairing.py), so that of a remote checkpoint only the shards that are needed are
fetched; shapes follow. All problems are collected before anything is computed.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_fast.checkpoints.experts import assign, expert_factors, whole
from safelora_fast.checkpoints.geometry import VOCABULARY, ExpertWeights, matrix_of
from safelora_fast.checkpoints.pairing import TensorNames
from safelora_fast.checkpoints.tensor_names import canonical, tower_of
from safelora_fast.errors import PairingError
from safelora_fast.projection.jobs import Group, Meeting, Plan, Problems, collect, meet, plan_groups, raise_first

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from safelora_fast.checkpoints.adapter import Adapter, LoraModule
    from safelora_fast.checkpoints.sources import Checkpoint
    from safelora_fast.checkpoints.tensor_names import Piece


@dataclass(frozen=True)
class _Linear:
    adapter: int
    module: LoraModule
    aligned: tuple[Piece, ...]
    base: tuple[Piece, ...]


@dataclass(frozen=True)
class _Experts:
    adapter: int
    modules: tuple[LoraModule, ...]
    aligned: ExpertWeights
    base: ExpertWeights


def plan_projection(adapters: Sequence[Adapter], aligned: Checkpoint, base: Checkpoint) -> Plan:
    """Pair every module of the adapters with its tensors in both checkpoints.

    Args:
        adapters: any number; modules that meet the same tensors share one job.
        aligned: the model that the adapters were trained on.
        base: the model before alignment; its tensors may be named, fused and typed differently.

    Raises:
        PairingError: when a module has no unambiguous counterpart of the right shape in both.
        CheckpointError: when a checkpoint is quantised.
    """
    names = TensorNames(aligned, "aligned"), TensorNames(base, "base")
    problems: Problems = []
    located: list[_Linear | _Experts] = []
    seen: list[tuple[TensorNames, TensorNames]] = []
    for index, adapter in enumerate(adapters):
        tower = tower_of(adapter.config)
        theirs = names[0].within(tower), names[1].within(tower)
        seen.append(theirs)
        nested: dict[str, list[LoraModule]] = defaultdict(list)
        for module in adapter.modules:
            if module.kind == "parameter":
                nested[module.name].append(module)
            else:
                collect(problems, module.name, located, lambda: [_linear(index, module, theirs)])  # noqa: B023
        for modules in nested.values():
            collect(problems, modules[0].name, located, lambda: [_experts(index, modules, theirs)])  # noqa: B023
    raise_first(problems, len(located))
    aligned.require(sorted({name for unit in located for name in _tensors(unit.aligned)}))
    base.require(sorted({name for unit in located for name in _tensors(unit.base)}))

    groups: dict[object, Group] = {}
    for unit in located:
        found: list[Group] = []
        adapter, theirs = adapters[unit.adapter], seen[unit.adapter]
        if isinstance(unit, _Linear):
            collect(problems, unit.module.name, found, lambda: [_linear_group(unit, adapter, theirs)])  # noqa: B023
        else:
            collect(problems, unit.modules[0].name, found, lambda: _expert_groups(unit, adapter, theirs))  # noqa: B023
        for group in found:
            _join(groups, group, problems)
    raise_first(problems, len(groups))

    return plan_groups(groups.values(), adapters)


def _linear(index: int, module: LoraModule, names: tuple[TensorNames, TensorNames]) -> _Linear:
    aligned, base = (name.weight(module.name) for name in names)
    return _Linear(index, module, aligned, base)


def _experts(index: int, modules: list[LoraModule], names: tuple[TensorNames, TensorNames]) -> _Experts:
    aligned, base = (ExpertWeights.locate(name, modules) for name in names)
    return _Experts(index, tuple(modules), aligned, base)


def _tensors(located: tuple[Piece, ...] | ExpertWeights) -> Iterable[str]:
    return located.tensors() if isinstance(located, ExpertWeights) else (piece.tensor for piece in located)


def _linear_group(unit: _Linear, adapter: Adapter, names: tuple[TensorNames, TensorNames]) -> Group:
    module = unit.module
    left, right = whole(module.left_key, module.left_shape), whole(module.right_key, module.right_shape)
    aligned, base = (
        matrix_of(
            name,
            pieces,
            module.name,
            (left.rows, right.cols),
            embedding=module.kind == "embedding",
            fan_in_fan_out=bool(adapter.config.get("fan_in_fan_out")),
        )
        for name, pieces in zip(names, (unit.aligned, unit.base), strict=True)
    )
    return meet(module.name, aligned, base, Meeting(unit.adapter, module, left, right))


def _expert_groups(unit: _Experts, adapter: Adapter, names: tuple[TensorNames, TensorNames]) -> list[Group]:
    weights = unit.aligned.shapes(names[0])
    version, model_type = adapter.config.get("peft_version"), names[0].setting("model_type")
    groups = []
    for module, parameter, swapped in assign(unit.modules, weights, model_type, version):
        aligned, base = unit.aligned.matrices(names[0], parameter), unit.base.matrices(names[1], parameter)
        if len(aligned) != len(base):
            raise PairingError(
                f"{module.name}: {parameter} has {len(aligned)} experts in the aligned model, {len(base)} in the base"
            )
        if module.rank % len(aligned):
            raise PairingError(
                f"{module.name}: the factors' common side is {module.rank}, which {len(aligned)} experts cannot share"
            )
        for expert, pair in enumerate(zip(aligned, base, strict=True)):
            left, right = expert_factors(module, expert, len(aligned), swapped=swapped)
            name = (
                f"{module.name}.{parameter}"
                if unit.aligned.flat(names[0], parameter)
                else f"{module.name}.{expert}.{parameter}"
            )
            groups.append(meet(name, *pair, Meeting(unit.adapter, module, left, right)))
    return groups


def _join(groups: dict[object, Group], group: Group, problems: Problems) -> None:
    """Add the factors of a group to those that meet the same V already."""
    known = groups.setdefault(group.identity, group)
    if known is group:
        return
    ours = group.factors[0]
    for other in known.factors:
        if other.adapter == ours.adapter and canonical(group.name) in VOCABULARY:
            groups[group.identity, group.name] = group  # tied weights, of which each module has an update of its own
            return
        if other.adapter == ours.adapter:
            both = f"{other.module.left_key} and {ours.module.left_key}"
            problem = PairingError(f"{group.name}: the adapter's {both} both belong to {group.aligned[0].tensor}")
            problems.append((ours.module.name, problem))
            return
    known.factors.extend(group.factors)
