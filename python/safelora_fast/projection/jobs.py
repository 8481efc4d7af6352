"""The modules of a projection plan: the weights for V, the LoRA factors, and the job for the Rust extension."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from safelora_fast import _core
from safelora_fast.checkpoints.geometry import Block, Matrix, cut_together
from safelora_fast.errors import PairingError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from safelora_fast.checkpoints.adapter import Adapter, LoraModule
    from safelora_fast.checkpoints.experts import Slice
    from safelora_fast.projection.settings import Settings


Problems = list[tuple[str, PairingError]]
MOST_TO_EXCLUDE = 3
LAYER = re.compile(r".*?\.\d+(?=\.)")


@dataclass(frozen=True)
class Source:
    """A pair of tensors whose difference is V or a block of rows of V."""

    aligned: str
    base: str
    aligned_file: str
    base_file: str


@dataclass(frozen=True)
class AdapterFactors:
    """lora_B and lora_A of one module; `adapter` is the index of the adapter in the plan."""

    adapter: int
    module: LoraModule
    lora_b: Slice
    lora_a: Slice


@dataclass
class Group:
    """V [m, n] as blocks of rows in both checkpoints, and the factors of all adapters that adapt this weight."""

    name: str
    aligned: tuple[Block, ...]
    base: tuple[Block, ...]
    shape: tuple[int, int]
    transposed: bool
    factors: list[AdapterFactors] = field(default_factory=list)

    @property
    def identity(self) -> object:
        """Equal for groups with the same V."""
        return self.transposed, tuple(block.identity for block in self.aligned + self.base)


@dataclass(frozen=True)
class PlannedModule:
    """A group with its job for the extension."""

    group: Group
    job: _core.Job

    @property
    def name(self) -> str:
        """The name of the first module with this V."""
        return self.group.name

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (m, n) of V."""
        return self.group.shape

    @property
    def sources(self) -> tuple[Source, ...]:
        """The pairs of tensors that V is computed from."""
        pairs = zip(self.group.aligned, self.group.base, strict=True)
        found = (Source(ours.tensor, theirs.tensor, ours.file.path, theirs.file.path) for ours, theirs in pairs)
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Plan:
    """The modules in the byte order of the aligned checkpoint, and their adapters."""

    modules: tuple[PlannedModule, ...]
    adapters: tuple[Adapter, ...]
    nbytes: int


class Stream(Protocol):
    """Yields the outcome of each module of a plan, in order, with the attributes of `_core.JobOutcome`."""

    def __iter__(self) -> Iterator[Any]: ...
    @property
    def nbytes(self) -> int: ...  # noqa: D102
    @property
    def bytes_done(self) -> int: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Start(Protocol):
    """Starts a stream over a plan; the caller must close it."""

    def __call__(self, plan: Plan, settings: Settings, *, keep_projected: bool) -> Stream: ...  # noqa: D102


def meet(name: str, aligned: Matrix, base: Matrix, factors: AdapterFactors | None = None) -> Group:
    """Pair the two weights of a module, and the factors of an adapter if given.

    Raises:
        PairingError: the two weights or the update differ in shape or orientation.
    """
    update = aligned.shape if factors is None else (factors.lora_b.rows, factors.lora_a.cols)
    shapes = (
        f"aligned {list(aligned.shape)} ({aligned.blocks[0].tensor}), base {list(base.shape)} ({base.blocks[0].tensor})"
    )
    if aligned.vocabulary and aligned.shape != base.shape:
        raise PairingError(
            f"{name}: the vocabulary was resized between the two models, so their difference is not defined: {shapes}; "
            "resize one to the other (resize_token_embeddings)"
        )
    if not aligned.shape == base.shape == update:
        what = (
            "weights differ in shape: "
            if factors is None
            else f"adapter's update is {list(update)}, but the weights are "
        )
        raise PairingError(f"{name}: the {what}{shapes}")
    if aligned.transposed != base.transposed:
        raise PairingError(f"{name}: one of the two checkpoints keeps it transposed: {shapes}")
    blocks = cut_together(aligned, base)
    return Group(name, *blocks, update, aligned.transposed, [] if factors is None else [factors])


def plan_groups(groups: Iterable[Group], adapters: Sequence[Adapter] = ()) -> Plan:
    """Build the plan of these groups in the byte order of the aligned checkpoint."""
    ordered = sorted(groups, key=lambda group: (group.aligned[0].file.path, group.aligned[0].begin, group.name))
    planned = tuple(_planned(group, adapters) for group in ordered)
    return Plan(planned, tuple(adapters), sum(module.job.nbytes for module in planned))


def start_stream(
    plan: Plan, settings: Settings, *, keep_projected: bool = False, keep_subspace: bool = False, seed: int = 0
) -> _core.ProjectionStream:
    """Start the extension's stream over a plan; the caller must close it.

    Raises:
        SettingsError: the system cannot start that many threads.
    """
    try:
        return _core.ProjectionStream(
            [module.job for module in plan.modules],
            settings.described_operator.in_rust(vars(settings)),
            keep_projected=keep_projected,
            keep_subspace=keep_subspace,
            threads=settings.threads,
            seed=seed,
        )
    except RuntimeError as error:
        raise SettingsError(f"{error}; ask for fewer with threads") from error


def refuse_equal(norms: Sequence[float]) -> None:
    """Check that the two checkpoints are different models.

    Raises:
        PairingError: all norms ‖V‖_F are zero.
    """
    if norms and not any(norms):
        raise PairingError(
            "aligned and base hold the same weights in every adapted module, so V = aligned - base is zero and there is "
            "nothing to project onto; give the model before alignment as --base"
        )


def collect(problems: Problems, name: str, into: list, work: Callable[[], Iterable]) -> None:  # type: ignore[type-arg]
    """Extend `into` by the result of `work`; on a PairingError, append to `problems` instead."""
    try:
        into.extend(work())
    except PairingError as problem:
        problems.append((name, problem))


def raise_first(problems: Problems, others: int) -> None:
    """Raise the first problem, if any, with the number of other problems and how to exclude these modules.

    Args:
        problems: pairs of a module's name and its error.
        others: the number of modules without a problem.

    Raises:
        PairingError: there is a problem.
    """
    if not problems:
        return
    more = f" (and {len(problems) - 1} more modules)" if len(problems) > 1 else ""
    few = _patterns({name for name, _ in problems})
    words = " ".join(f"--exclude {pattern}" for pattern in few)
    way = f"; to project the others: {words} (in Python, exclude={few})" if others else ""
    raise PairingError(f"{problems[0][1]}{more}{way}")


def _patterns(names: set[str]) -> list[str]:
    """Return up to three patterns that match these modules, by name, layer, or last part of the name."""
    layers = {f"{match[0]}.*" if (match := LAYER.match(name)) else name for name in names}
    ends = {name.rpartition(".")[2] for name in names}
    return next((sorted(few) for few in (names, layers, ends) if len(few) <= MOST_TO_EXCLUDE), ["PATTERN"])


def _planned(group: Group, adapters: Sequence[Adapter]) -> PlannedModule:
    parts = [_core.Part(ours.view(), theirs.view()) for ours, theirs in zip(group.aligned, group.base, strict=True)]
    factors = [
        _core.Factors(_view(adapters[found.adapter], found.lora_b), _view(adapters[found.adapter], found.lora_a))
        for found in group.factors
    ]
    return PlannedModule(group, _core.Job(group.name, parts, factors, transposed=group.transposed))


def _view(adapter: Adapter, part: Slice) -> _core.View:
    strides = {"row_stride": part.row_stride, "col_stride": part.col_stride}
    return _core.View(adapter.file, part.key, offset=part.offset, rows=part.rows, cols=part.cols, **strides)
