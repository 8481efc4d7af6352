"""The plan of a projection: for every adapted module, which bytes of both checkpoints meet which factors.

Names are settled first (posthoc/pairing.py), so that of a remote checkpoint only the shards that are needed are
fetched; shapes follow. All problems are collected before anything is computed.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from safelora_fast import _core
from safelora_fast.errors import PairingError
from safelora_fast.posthoc.experts import Slice, assign, expert_factors, whole
from safelora_fast.posthoc.geometry import Block, ExpertWeights, Matrix, cut_together, matrix_of
from safelora_fast.posthoc.pairing import TensorNames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from safelora_fast.posthoc.adapter import Adapter, LoraModule
    from safelora_fast.posthoc.pairing import Piece
    from safelora_fast.posthoc.sources import Checkpoint


@dataclass(frozen=True)
class Target:
    """Where a projected left factor (rows, cols) goes: a strided matrix in one tensor of one adapter, in elements."""

    adapter: int
    key: str
    module: LoraModule
    offset: int
    rows: int
    cols: int
    row_stride: int
    col_stride: int


@dataclass(frozen=True)
class Source:
    """A pair of tensors whose difference is V, or a block of rows of it."""

    aligned: str
    base: str
    aligned_file: str
    base_file: str


@dataclass(frozen=True)
class PlannedModule:
    """One weight: its job, where V comes from, and one target for each of the job's factors, in the same order."""

    name: str
    job: _core.Job
    sources: tuple[Source, ...]
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Plan:
    """The modules in the order in which the bytes of the aligned checkpoint lie."""

    modules: tuple[PlannedModule, ...]
    nbytes: int


@dataclass
class _Group:
    """The factors of all adapters that meet the same V."""

    name: str
    aligned: tuple[Block, ...]
    base: tuple[Block, ...]
    transposed: bool
    factors: list[tuple[int, LoraModule, Slice, Slice]] = field(default_factory=list)


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
    problems: list[PairingError] = []
    located: list[_Linear | _Experts] = []
    for index, adapter in enumerate(adapters):
        nested: dict[str, list[LoraModule]] = defaultdict(list)
        for module in adapter.modules:
            if module.kind == "parameter":
                nested[module.name].append(module)
            else:
                _collect(problems, located, lambda: [_linear(index, module, names)])  # noqa: B023
        for modules in nested.values():
            _collect(problems, located, lambda: [_experts(index, modules, names)])  # noqa: B023
    _raise_first(problems)
    aligned.require(sorted({name for unit in located for name in _tensors(unit.aligned)}))
    base.require(sorted({name for unit in located for name in _tensors(unit.base)}))

    groups: dict[object, _Group] = {}
    for unit in located:
        found: list[_Group] = []
        adapter = adapters[unit.adapter]
        if isinstance(unit, _Linear):
            _collect(problems, found, lambda: [_linear_group(unit, adapter, names)])  # noqa: B023
        else:
            _collect(problems, found, lambda: _expert_groups(unit, adapter, names))  # noqa: B023
        for group in found:
            _join(groups, group, problems)
    _raise_first(problems)

    ordered = sorted(
        groups.values(), key=lambda group: (group.aligned[0].file.path, group.aligned[0].begin, group.name)
    )
    planned = tuple(_planned(group, adapters) for group in ordered)
    return Plan(planned, sum(module.job.nbytes for module in planned))


def _collect(problems: list[PairingError], into: list, work: Callable[[], Iterable]) -> None:  # type: ignore[type-arg]
    try:
        into.extend(work())
    except PairingError as problem:
        problems.append(problem)


def _raise_first(problems: list[PairingError]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more modules)" if len(problems) > 1 else ""
        raise PairingError(f"{problems[0]}{more}")


def _linear(index: int, module: LoraModule, names: tuple[TensorNames, TensorNames]) -> _Linear:
    aligned, base = (name.weight(module.name) for name in names)
    return _Linear(index, module, aligned, base)


def _experts(index: int, modules: list[LoraModule], names: tuple[TensorNames, TensorNames]) -> _Experts:
    aligned, base = (ExpertWeights.locate(name, modules) for name in names)
    return _Experts(index, tuple(modules), aligned, base)


def _tensors(located: tuple[Piece, ...] | ExpertWeights) -> Iterable[str]:
    return located.tensors() if isinstance(located, ExpertWeights) else (piece.tensor for piece in located)


def _linear_group(unit: _Linear, adapter: Adapter, names: tuple[TensorNames, TensorNames]) -> _Group:
    module = unit.module
    left, right = whole(module.left_key, module.left_shape), whole(module.right_key, module.right_shape)
    aligned, base = (
        matrix_of(name, pieces, module, adapter.config)
        for name, pieces in zip(names, (unit.aligned, unit.base), strict=True)
    )
    return _group(module.name, aligned, base, (unit.adapter, module, left, right))


def _expert_groups(unit: _Experts, adapter: Adapter, names: tuple[TensorNames, TensorNames]) -> list[_Group]:
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
            groups.append(_group(name, *pair, (unit.adapter, module, left, right)))
    return groups


def _group(name: str, aligned: Matrix, base: Matrix, factors: tuple[int, LoraModule, Slice, Slice]) -> _Group:
    left, right = factors[2], factors[3]
    aligned_shape, base_shape, update = aligned.shape, base.shape, (left.rows, right.cols)
    if aligned_shape == base_shape == update and aligned.transposed == base.transposed:
        return _Group(name, *cut_together(aligned, base), aligned.transposed, [factors])
    shapes = (
        f"aligned {list(aligned_shape)} ({aligned.blocks[0].tensor}), base {list(base_shape)} ({base.blocks[0].tensor})"
    )
    if aligned_shape == base_shape == update:
        raise PairingError(f"{name}: one of the two checkpoints keeps it transposed: {shapes}")
    if aligned.vocabulary and aligned_shape != base_shape:
        raise PairingError(
            f"{name}: the vocabulary was resized between the two models, so their difference is not defined: {shapes}; "
            "resize one to the other (resize_token_embeddings), or train the adapter without this module"
        )
    raise PairingError(f"{name}: the adapter's update is {list(update)}, but the weights are {shapes}")


def _join(groups: dict[object, _Group], group: _Group, problems: list[PairingError]) -> None:
    """Add the factors of a group to those that meet the same V already."""
    key = (group.transposed, tuple(block.identity for block in group.aligned + group.base))
    known = groups.setdefault(key, group)
    if known is group:
        return
    for adapter, module, _, _ in known.factors:
        if adapter == group.factors[0][0]:
            problems.append(
                PairingError(
                    f"{group.name}: the adapter's {module.left_key} and {group.factors[0][1].left_key} both belong to "
                    f"{group.aligned[0].tensor}"
                )
            )
            return
    known.factors.extend(group.factors)


def _planned(group: _Group, adapters: Sequence[Adapter]) -> PlannedModule:
    parts = [_core.Part(ours.view(), theirs.view()) for ours, theirs in zip(group.aligned, group.base, strict=True)]
    factors = [
        _core.Factors(_view(adapters[adapter], left), _view(adapters[adapter], right))
        for adapter, _, left, right in group.factors
    ]
    targets = tuple(
        Target(adapter, left.key, module, left.offset, left.rows, left.cols, left.row_stride, left.col_stride)
        for adapter, module, left, _ in group.factors
    )
    sources = tuple(
        dict.fromkeys(
            Source(ours.tensor, theirs.tensor, ours.file.path, theirs.file.path)
            for ours, theirs in zip(group.aligned, group.base, strict=True)
        )
    )
    return PlannedModule(
        group.name, _core.Job(group.name, parts, factors, transposed=group.transposed), sources, targets
    )


def _view(adapter: Adapter, matrix: Slice) -> _core.View:
    return _core.View(
        adapter.file,
        matrix.key,
        offset=matrix.offset,
        rows=matrix.rows,
        cols=matrix.cols,
        row_stride=matrix.row_stride,
        col_stride=matrix.col_stride,
    )
