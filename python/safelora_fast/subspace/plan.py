"""The plan of a safe subspace: which weights of two checkpoints make V, without an adapter that would say so.

The aligned checkpoint names the modules, and the base is paired with it by the same rules as in a projection.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_fast.checkpoints.geometry import ExpertWeights, matrix_of
from safelora_fast.checkpoints.pairing import FUSED, INPUT_EMBEDDINGS, TensorNames
from safelora_fast.checkpoints.tensor_names import Piece, canonical, matching
from safelora_fast.errors import PairingError, SettingsError
from safelora_fast.projection.jobs import Group, Plan, Problems, collect, meet, plan_groups, raise_first

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from safelora_fast.checkpoints.sources import Checkpoint

IN_A_BLOCK = re.compile(r".*\.\d+\..+")
OF_EXPERTS = re.compile(r"(?P<module>.*\.experts)\.(?P<parameter>[^.]+)")


@dataclass(frozen=True)
class _Linear:
    """A linear or embedding module and its pieces."""

    name: str
    aligned: tuple[Piece, ...]
    base: tuple[Piece, ...]


@dataclass(frozen=True)
class _Experts:
    """One parameter of all experts of a module."""

    module: str
    parameter: str
    aligned: ExpertWeights
    base: ExpertWeights


def plan_subspace(
    aligned: Checkpoint, base: Checkpoint, endings: Sequence[str] | None, exclude: Sequence[str] = ()
) -> Plan:
    """Pair modules of the aligned checkpoint with their tensors in the base.

    Args:
        aligned: the aligned model, whose tensors name the modules.
        base: the model before alignment; its tensors may be named, fused and typed differently.
        endings: the last components of the modules' names ("q_proj", "mlp.down_proj"), on disk or as transformers
            spells them; parts of a fused weight and fused modules of separate weights count. None stands for every
            linear weight of the numbered blocks, experts aside.
        exclude: names or patterns of modules to exclude (:func:`~safelora_fast.checkpoints.tensor_names.matching`).

    Raises:
        SettingsError: when a pattern to exclude matches nothing, or everything.
        PairingError: when a name ends no module, or a module has no unambiguous counterpart of the same shape.
        CheckpointError: when a checkpoint is quantised.
    """
    names = TensorNames(aligned, "aligned"), TensorNames(base, "base")
    found = _in_blocks(aligned) if endings is None else _ending(aligned, endings)
    for pattern in exclude:
        if not any(matching(name, [pattern]) for name in found):
            raise SettingsError(f"exclude: none of the modules is called {pattern!r}")
    found = [name for name in found if not matching(name, exclude)]
    if not found:
        raise SettingsError(f"{', '.join(map(repr, exclude))} excludes every module")
    problems: Problems = []
    located: list[_Linear | _Experts] = []
    for name in found:
        collect(problems, name, located, lambda: [_locate(name, names)])  # noqa: B023
    raise_first(problems, len(located))
    aligned.require(sorted({tensor for unit in located for tensor in _tensors(unit.aligned)}))
    base.require(sorted({tensor for unit in located for tensor in _tensors(unit.base)}))
    groups: list[Group] = []
    for unit in located:
        collect(problems, _name(unit), groups, lambda: _groups(unit, names))  # noqa: B023
    raise_first(problems, len(groups))
    return plan_groups(groups)


def _in_blocks(aligned: Checkpoint) -> list[str]:
    """The matrices of the numbered blocks, which is known once their shards have been opened."""
    weights = [
        name
        for name in aligned.names
        if name.endswith(".weight") and IN_A_BLOCK.fullmatch(name) and ".experts." not in canonical(name)
    ]
    aligned.require(weights)
    found = [name.removesuffix(".weight") for name in weights if len(aligned.tensor(name).shape) == 2]
    if not found:
        raise PairingError(f"{aligned.description}: no linear weight lies in a numbered block; name the modules")
    return found


def _ending(aligned: Checkpoint, endings: Sequence[str]) -> list[str]:
    """The modules whose names end in one of these."""
    found: dict[str, None] = {}
    used: set[str] = set()
    for tensor in aligned.names:
        for module in _modules(tensor):
            spellings = (module, _canonical(module))
            ends = [ending for ending in endings if any(f".{name}".endswith(f".{ending}") for name in spellings)]
            used.update(ends)
            if ends:
                found[module] = None
    for ending in endings:
        if ending not in used:
            own = (next(_modules(tensor), "") for tensor in aligned.names)
            leaves = sorted({module.rpartition(".")[2] for module in own} - {""})
            raise PairingError(
                f"{aligned.description}: no module ends in {ending!r}; its modules end in {', '.join(leaves)}"
            )
    return list(found)


def _modules(tensor: str) -> Iterator[str]:
    """The modules that a tensor may belong to: its own, those fused in it, and the one that fuses it with others."""
    if OF_EXPERTS.fullmatch(canonical(tensor)):
        yield canonical(tensor)
        return
    module = tensor.removesuffix(".weight")
    if module == tensor:
        return
    yield module
    owner, _, leaf = module.rpartition(".")
    for part in FUSED.get(leaf, ()):
        yield f"{owner}.{part}"
    # Experts may be spelled w1 and w3 on disk.
    owner, _, leaf = _canonical(module).rpartition(".")
    for fused, parts in FUSED.items():
        if leaf == parts[0]:
            yield f"{owner}.{fused}"


def _canonical(module: str) -> str:
    return canonical(f"{module}.weight").removesuffix(".weight")


def _locate(name: str, names: tuple[TensorNames, TensorNames]) -> _Linear | _Experts:
    experts = OF_EXPERTS.fullmatch(name)
    if experts is None:
        aligned, base = (each.weight(name) for each in names)
        return _Linear(name, aligned, base)
    module, parameter = experts["module"], experts["parameter"]
    weights = []
    for each in names:
        weight = each.parameter(module, parameter)
        if weight is None:
            raise each.missing(name, name)
        weights.append(ExpertWeights(module, {parameter: weight}))
    return _Experts(module, parameter, *weights)


def _tensors(located: tuple[Piece, ...] | ExpertWeights) -> Iterable[str]:
    return located.tensors() if isinstance(located, ExpertWeights) else (piece.tensor for piece in located)


def _name(unit: _Linear | _Experts) -> str:
    return unit.name if isinstance(unit, _Linear) else f"{unit.module}.{unit.parameter}"


def _groups(unit: _Linear | _Experts, names: tuple[TensorNames, TensorNames]) -> list[Group]:
    if isinstance(unit, _Linear):
        embedding = canonical(unit.name) in INPUT_EMBEDDINGS
        aligned = matrix_of(names[0], unit.aligned, unit.name, None, embedding=embedding)
        base = matrix_of(names[1], unit.base, unit.name, aligned.shape, embedding=embedding)
        return [meet(unit.name, aligned, base)]
    aligned_experts = unit.aligned.matrices(names[0], unit.parameter)
    base_experts = unit.base.matrices(names[1], unit.parameter)
    if len(aligned_experts) != len(base_experts):
        counts = f"{len(aligned_experts)} experts in the aligned model, {len(base_experts)} in the base"
        raise PairingError(f"{unit.module}: {unit.parameter} has {counts}")
    if unit.aligned.flat(names[0], unit.parameter):
        return [meet(f"{unit.module}.{unit.parameter}", aligned_experts[0], base_experts[0])]
    return [
        meet(f"{unit.module}.{expert}.{unit.parameter}", *pair)
        for expert, pair in enumerate(zip(aligned_experts, base_experts, strict=True))
    ]
