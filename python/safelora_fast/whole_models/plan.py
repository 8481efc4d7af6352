"""Plan the projection of a whole model: which tensors are modules, and where their three weights are.

The aligned model names the modules. The fine-tuned model must have its tensors, by name and shape; the base may name
and fuse them differently, as for an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from safelora_fast.checkpoints.geometry import VOCABULARY, Block, weight_entry
from safelora_fast.checkpoints.pairing import TensorNames
from safelora_fast.checkpoints.sources import Checkpoint
from safelora_fast.checkpoints.tensor_names import canonical, matching
from safelora_fast.errors import PairingError
from safelora_fast.projection.jobs import Problems, raise_first
from safelora_fast.subspace.plan import IN_A_LAYER, OF_EXPERTS, plan_modules

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safelora_fast import _core
    from safelora_fast.projection.jobs import PlannedModule
    from safelora_fast.subspace.module_subspace import ModuleSubspace
    from safelora_fast.subspace.safe_subspace import SafeSubspace

Others = Literal["finetuned", "aligned"]  # where the tensors come from that are no modules
WIDTHS = {"F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class WholeModule:
    """One module: V with its job, and the rows of the fine-tuned tensor, one block for each part of the job.

    With a subspace, the base of the job is the aligned weight, and is not read.
    """

    planned: PlannedModule
    finetuned: tuple[Block, ...]
    subspace: ModuleSubspace | None = None

    @property
    def name(self) -> str:
        """The name of the module."""
        return self.planned.name

    @property
    def nbytes(self) -> int:
        """Bytes of the module in the fine-tuned model, which lie in one piece."""
        first = self.finetuned[0]
        return sum(block.rows for block in self.finetuned) * first.cols * WIDTHS[first.dtype]

    @property
    def bytes_read(self) -> int:
        """Bytes that are read of all models."""
        return self.nbytes + self.planned.job.nbytes // (1 if self.subspace is None else 2)

    @property
    def begin(self) -> int:
        """Offset of these bytes in the file."""
        return self.finetuned[0].begin + self.finetuned[0].offset * WIDTHS[self.finetuned[0].dtype]


@dataclass(frozen=True)
class WholePlan:
    """What happens to each tensor of the fine-tuned model.

    Attributes:
        shards: the files of the fine-tuned model, each with its modules in the order of their bytes.
        others: the other tensors, with the tensor of the aligned model that has the same shape, or None.
        excluded: modules that the user excluded.
        nbytes: bytes of all modules that are read.
    """

    shards: Mapping[str, tuple[_core.SafetensorsFile, list[WholeModule]]]
    others: Mapping[str, str | None]
    excluded: list[str]
    nbytes: int

    @property
    def modules(self) -> list[WholeModule]:
        """All modules, in the order of the files."""
        return [module for _, modules in self.shards.values() for module in modules]


def plan_whole_model(
    finetuned: Checkpoint,
    aligned: Checkpoint,
    base: Checkpoint | SafeSubspace,
    *,
    embeddings: bool,
    exclude: Sequence[str] = (),
) -> WholePlan:
    """Match each tensor of a fine-tuned model with the aligned model, and each module with V.

    Args:
        finetuned: a full fine-tune of the aligned model.
        aligned: the model that was fine-tuned.
        base: the model before alignment, or the subspace of the pair.
        embeddings: whether input embeddings and the head are modules too, beside the linear weights and experts of the
            numbered layers.
        exclude: names or patterns of modules to leave unchanged.

    Raises:
        PairingError: the model is no fine-tune of `aligned`, or a module has no counterpart in the base or subspace.
        CheckpointError: a checkpoint is quantized.
        SettingsError: an exclude pattern matches nothing, or all modules are excluded.
    """
    for checkpoint in (finetuned, aligned):
        checkpoint.require(checkpoint.names)
    names = TensorNames(finetuned, "fine-tuned")
    own = _paired(finetuned, aligned, names)
    modules = {
        tensor: module for tensor in own if (module := _module(aligned, tensor, own[tensor], finetuned, embeddings))
    }
    for tensor in modules:
        weight_entry(names, own[tensor])
    subspace = None if isinstance(base, Checkpoint) else base
    plan = plan_modules(aligned, base if isinstance(base, Checkpoint) else aligned, list(modules.values()), exclude)
    vectors = {} if subspace is None else _vectors(plan.modules, subspace)
    shards: dict[str, tuple[_core.SafetensorsFile, list[WholeModule]]] = {
        file.path: (file, []) for file in sorted(finetuned.files, key=lambda file: file.path)
    }
    for planned in plan.modules:
        blocks = []
        for block in planned.group.aligned:
            entry = finetuned.tensor(own[block.tensor])
            blocks.append(
                replace(block, tensor=own[block.tensor], file=entry.file, dtype=entry.dtype, begin=entry.begin)
            )
        shards[blocks[0].file.path][1].append(WholeModule(planned, tuple(blocks), vectors.get(planned.name)))
    for _, found in shards.values():
        found.sort(key=lambda module: module.begin)
    chosen = {block.tensor for _, found in shards.values() for module in found for block in module.finetuned}
    partners = {theirs: ours for ours, theirs in own.items()}
    others = {name: partners.get(name) for name in finetuned.names if name not in chosen}
    for name, partner in others.items():
        if partner is not None and finetuned.tensor(name).shape != aligned.tensor(partner).shape:
            others[name] = None
    excluded = [module for module in modules.values() if matching(module, exclude)]
    return WholePlan(
        shards, others, excluded, sum(module.bytes_read for _, found in shards.values() for module in found)
    )


def _vectors(modules: Sequence[PlannedModule], subspace: SafeSubspace) -> dict[str, ModuleSubspace]:
    """Return the subspace of each module.

    Raises:
        PairingError: a module is not in the subspace, or its shape differs.
    """
    problems: Problems = []
    found: dict[str, ModuleSubspace] = {}
    for module in modules:
        try:
            one = subspace.find(module.name)
            if (shape := (len(one.left_vectors), one.columns)) != module.shape:
                raise PairingError(f"{module.name}: is {list(module.shape)}, but {list(shape)} in the subspace")
        except PairingError as problem:
            problems.append((module.name, problem))
        else:
            found[module.name] = one
    raise_first(problems, len(found))
    return found


def _paired(finetuned: Checkpoint, aligned: Checkpoint, names: TensorNames) -> dict[str, str]:
    """Return the fine-tuned tensor of each aligned one. Only vocabulary tensors may be absent or resized.

    Raises:
        PairingError: the names or shapes are those of another model.
    """
    found = {name: theirs for name in aligned.names if (theirs := names.find(name)) is not None}
    weights = {name for name in aligned.names if name.endswith(".weight") and not _of_vocabulary(name)}
    problems = [f"it lacks {name}" for name in sorted(weights - found.keys())]
    extra = {name for name in finetuned.names if name.endswith(".weight") and IN_A_LAYER.fullmatch(name)}
    problems += [f"the aligned model lacks {name}" for name in sorted(extra - set(found.values()))]
    for name, theirs in found.items():
        shapes = [list(finetuned.tensor(theirs).shape), list(aligned.tensor(name).shape)]
        if shapes[0] != shapes[1] and not _of_vocabulary(name):
            problems.append(f"{theirs} is {shapes[0]}, but {shapes[1]} in the aligned model")
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise PairingError(
            f"{finetuned.description}: is no full fine-tune of {aligned.description}: {problems[0]}{more}; give the model "
            "that it was trained from as --aligned"
        )
    return found


def _of_vocabulary(name: str) -> bool:
    return canonical(name).removesuffix(".weight") in VOCABULARY


def _module(aligned: Checkpoint, tensor: str, own: str, finetuned: Checkpoint, embeddings: bool) -> str | None:
    """Return the module of a tensor that can be projected, or None."""
    shape = aligned.tensor(tensor).shape
    if _of_vocabulary(tensor):
        known = embeddings and len(shape) == 2 and finetuned.tensor(own).shape == shape
        return tensor.removesuffix(".weight") if known else None
    if len(shape) == 3 and OF_EXPERTS.fullmatch(canonical(tensor)):
        return canonical(tensor)
    if len(shape) == 2 and tensor.endswith(".weight") and IN_A_LAYER.fullmatch(tensor):
        return tensor.removesuffix(".weight")
    return None
