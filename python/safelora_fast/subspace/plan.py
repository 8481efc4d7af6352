"""Plan a safe subspace: choose the weights of two checkpoints that form V, without an adapter.

The aligned checkpoint names the modules. They are paired with the base by the same rules as in a projection.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from safelora_fast.checkpoints.geometry import ExpertWeights, matrix_of
from safelora_fast.checkpoints.pairing import FUSED, INPUT_EMBEDDINGS, TensorNames
from safelora_fast.checkpoints.tensor_names import Piece, canonical, matching
from safelora_fast.errors import MissingDependencyError, PairingError, SettingsError, how_to_install
from safelora_fast.projection.jobs import (
    Group,
    Plan,
    Problems,
    collect,
    meet,
    plan_groups,
    raise_first,
    start_stream,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from safelora_fast import _core
    from safelora_fast.checkpoints.sources import Checkpoint
    from safelora_fast.projection.device.subspace_stream import SubspaceStream
    from safelora_fast.projection.settings import Settings

IN_A_LAYER = re.compile(r".*\.\d+\..+")
OF_EXPERTS = re.compile(r"(?P<module>.*\.experts)\.(?P<parameter>[^.]+)")
Weight: TypeAlias = "tuple[Piece, ...] | ExpertWeights"


@dataclass(frozen=True)
class _Unit:
    """A linear or embedding module, or one parameter of all experts of a module (`experts`, `parameter`)."""

    name: str
    aligned: Weight
    base: Weight
    experts: str = ""
    parameter: str = ""

    def groups(self, names: tuple[TensorNames, TensorNames]) -> list[Group]:
        """Return V of the module, or of each expert.

        Raises:
            PairingError: the two weights are incompatible.
        """
        if not isinstance(self.aligned, ExpertWeights) or not isinstance(self.base, ExpertWeights):
            embedding = canonical(self.name) in INPUT_EMBEDDINGS
            aligned = matrix_of(names[0], self.aligned, self.name, None, embedding=embedding)  # type: ignore[arg-type]
            base = matrix_of(names[1], self.base, self.name, aligned.shape, embedding=embedding)  # type: ignore[arg-type]
            return [meet(self.name, aligned, base)]
        ours = self.aligned.matrices(names[0], self.parameter)
        theirs = self.base.matrices(names[1], self.parameter)
        if len(ours) != len(theirs):
            counts = f"{len(ours)} experts in the aligned model, {len(theirs)} in the base"
            raise PairingError(f"{self.experts}: {self.parameter} has {counts}")
        if self.aligned.flat(names[0], self.parameter):
            return [meet(self.name, ours[0], theirs[0])]
        return [
            meet(f"{self.experts}.{expert}.{self.parameter}", *pair)
            for expert, pair in enumerate(zip(ours, theirs, strict=True))
        ]


def plan_subspace(
    aligned: Checkpoint, base: Checkpoint, endings: Sequence[str] | None, exclude: Sequence[str] = ()
) -> Plan:
    """Pair modules of the aligned checkpoint with their tensors in the base.

    Args:
        aligned: the aligned model, whose tensors name the modules.
        base: the model before alignment; its tensors may be named, fused and typed differently.
        endings: the last components of the modules' names ("q_proj", "mlp.down_proj"), as on disk or in transformers.
            Parts of a fused weight and fused modules of separate weights are allowed. None selects every linear weight
            of the numbered layers, except experts.
        exclude: names or patterns of modules to exclude (:func:`~safelora_fast.checkpoints.tensor_names.matching`).

    Raises:
        SettingsError: an exclude pattern matches nothing, or all modules are excluded.
        PairingError: no module has one of the endings, or a module has no unambiguous counterpart of the same shape.
        CheckpointError: a checkpoint is quantized.
    """
    found = _in_layers(aligned) if endings is None else _ending(aligned, endings)
    return plan_modules(aligned, base, found, exclude)


def plan_modules(aligned: Checkpoint, base: Checkpoint, found: Sequence[str], exclude: Sequence[str] = ()) -> Plan:
    """Pair named modules of the aligned checkpoint with their tensors in the base; see :func:`plan_subspace`.

    Raises:
        SettingsError: an exclude pattern matches nothing, or all modules are excluded.
        PairingError: a module has no unambiguous counterpart of the same shape.
        CheckpointError: a checkpoint is quantized.
    """
    names = TensorNames(aligned, "aligned"), TensorNames(base, "base")
    for pattern in exclude:
        if not any(matching(name, [pattern]) for name in found):
            raise SettingsError(f"exclude: none of the modules is called {pattern!r}")
    found = [name for name in found if not matching(name, exclude)]
    if not found:
        raise SettingsError(f"{', '.join(map(repr, exclude))} excludes every module")
    problems: Problems = []
    units: list[_Unit] = []
    for name in found:
        collect(problems, name, units, lambda: [_locate(name, names)])  # noqa: B023
    raise_first(problems, len(units))
    aligned.require({tensor for unit in units for tensor in _tensors(unit.aligned)})
    base.require({tensor for unit in units for tensor in _tensors(unit.base)})
    groups: list[Group] = []
    for unit in units:
        collect(problems, unit.name, groups, lambda: unit.groups(names))  # noqa: B023
    raise_first(problems, len(groups))
    return plan_groups(groups)


def checked_device(name: str | None) -> torch.device | None:
    """Return the torch device of this name; None stands for the extension on the CPU.

    Raises:
        SettingsError, BackendError: the device does not exist.
        MissingDependencyError: torch is not installed.
    """
    if name is None:
        return None
    try:
        from safelora_fast.projection.device.stream import torch_device
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError(f"device {name!r} needs torch: {how_to_install('train')}") from error
    return torch_device(name)


def start(
    plan: Plan, settings: Settings, seed: int, device: torch.device | None
) -> _core.ProjectionStream | SubspaceStream:
    """Start the stream that computes a plan. The caller must close the stream."""
    if device is None:
        return start_stream(plan, settings, keep_subspace=True, seed=seed)
    from safelora_fast.projection.device.subspace_stream import SubspaceStream

    return SubspaceStream(plan, settings, device=device, seed=seed)


def _in_layers(aligned: Checkpoint) -> list[str]:
    """Return the linear modules of the numbered layers. Their shards are opened to read the shapes."""
    weights = [
        name
        for name in aligned.names
        if name.endswith(".weight") and IN_A_LAYER.fullmatch(name) and ".experts." not in canonical(name)
    ]
    aligned.require(weights)
    found = [name.removesuffix(".weight") for name in weights if len(aligned.tensor(name).shape) == 2]
    if not found:
        raise PairingError(f"{aligned.description}: no linear weight lies in a numbered layer; name the modules")
    return found


def _ending(aligned: Checkpoint, endings: Sequence[str]) -> list[str]:
    """Return the modules whose names end in one of these."""
    found: dict[str, None] = {}
    unused = set(endings)
    for tensor in aligned.names:
        for module in _modules(tensor):
            spellings = (f".{module}", f".{_canonical(module)}")
            ends = [ending for ending in endings if any(name.endswith(f".{ending}") for name in spellings)]
            unused.difference_update(ends)
            if ends:
                found[module] = None
    for ending in endings:
        if ending in unused:
            own = (next(_modules(tensor), "") for tensor in aligned.names)
            leaves = sorted({module.rpartition(".")[2] for module in own} - {""})
            raise PairingError(
                f"{aligned.description}: no module ends in {ending!r}; its modules end in {', '.join(leaves)}"
            )
    return list(found)


def _modules(tensor: str) -> Iterator[str]:
    """Yield the modules that a tensor may belong to: its own, those fused in it, and the one that fuses it."""
    if OF_EXPERTS.fullmatch(canonical(tensor)):
        yield canonical(tensor)
        return
    module = tensor.removesuffix(".weight")
    if module == tensor:
        return
    yield module
    owner, _, leaf = module.rpartition(".")
    yield from (f"{owner}.{part}" for part in FUSED.get(leaf, ()))
    owner, _, leaf = _canonical(module).rpartition(".")  # experts may be called w1 and w3 on disk
    yield from (f"{owner}.{fused}" for fused, parts in FUSED.items() if leaf == parts[0])


def _canonical(module: str) -> str:
    return canonical(f"{module}.weight").removesuffix(".weight")


def _locate(name: str, names: tuple[TensorNames, TensorNames]) -> _Unit:
    experts = OF_EXPERTS.fullmatch(name)
    if experts is None:
        aligned, base = (each.weight(name) for each in names)
        return _Unit(name, aligned, base)
    module, parameter = experts["module"], experts["parameter"]
    weights = []
    for each in names:
        weight = each.parameter(module, parameter)
        if weight is None:
            raise each.missing(name, name)
        weights.append(ExpertWeights(module, {parameter: weight}))
    return _Unit(name, weights[0], weights[1], module, parameter)


def _tensors(weight: Weight) -> Iterator[str]:
    return weight.tensors() if isinstance(weight, ExpertWeights) else (piece.tensor for piece in weight)
