"""A projection whose modules several machines share: each writes the outcomes of its modules, and one joins them.

A module's outcome does not depend on other modules, so the joined output has the bytes that one machine would write,
also where the selection depends on all modules.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

from safelora_fast.checkpoints.adapter import load_adapters
from safelora_fast.errors import AdapterError, CheckpointError
from safelora_fast.files.json_reader import COUNT, LIST, NUMBER, TEXT, check_fields
from safelora_fast.files.output import check_file
from safelora_fast.files.store import changes_text
from safelora_fast.files.tensor_file import TensorFile
from safelora_fast.projection.made_from import adapter_digest, differences, made_from
from safelora_fast.projection.model_pair import local_models, open_pair
from safelora_fast.projection.settings import Settings, chosen

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from safelora_fast.checkpoints.experts import Slice
    from safelora_fast.projection.fleet_shard import Shard
    from safelora_fast.projection.jobs import Plan
    from safelora_fast.projection.module_reports import Progress
    from safelora_fast.projection.settings import Settings

FILE = TensorFile("safelora_fast.part", 1, "part of a projection", "safelora-fast project --modules-shard")
MODULE = {"name": TEXT, "v_norm": NUMBER, "factors": LIST}
OF_V = {"rank": COUNT, "energy": NUMBER}
METRICS = ("cosine", "gain", "lora_b_norm", "lora_b_norm_projected", "update_norm", "update_norm_projected")
FACTORS = {**dict.fromkeys(METRICS, NUMBER), "A": TEXT, "B": TEXT, "failure": TEXT}
# How the values of a stored dtype become float32, and back: both without rounding.
WIDTHS: dict[str, Any] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def project_part(
    adapters: Sequence[str | Path],
    settings: Settings,
    *,
    aligned: str | Path,
    base: str | Path,
    output: Path,
    shard: Shard,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Project a share of the modules, and write their outcomes to `part-I-of-N.safetensors` in a folder.

    The modules are cut, in the byte order of the aligned checkpoint, into N runs of about equal size.

    Raises:
        SafeLoraFastError: an input is invalid; the message is one line, and nothing is written.
    """
    target = output / f"part-{shard.index}-of-{shard.count}.safetensors"
    loaded = load_adapters(adapters, settings.exclude)
    check_file(target, [*(adapter.path for adapter in loaded), *local_models(aligned, base)], overwrite=overwrite)
    pair = open_pair(aligned, base)
    plan = pair.plan(loaded)
    document = _document(plan, pair.identity(), settings, shard)
    mine = _share(plan, shard)
    tensors: dict[str, np.ndarray] = {}
    with contextlib.closing(pair.start(mine, settings, keep_projected=True)) as stream:
        if progress is not None:
            progress.start(stream.nbytes, len(mine.modules))
        for outcome in stream:
            planned = mine.modules[outcome.index]
            factors = []
            for number, (one, found) in enumerate(zip(planned.group.factors, outcome.factors, strict=True)):
                metrics: dict[str, Any] = {name: _stored(getattr(found, name)) for name in METRICS}
                if chosen({planned.name: found.cosine}, settings):
                    try:
                        blocks = {"B": (one.lora_b, found.projected()), "A": (one.lora_a, found.projected_lora_a())}
                    except AdapterError as error:
                        metrics["failure"], blocks = str(error), {}
                    for side, (block, content) in blocks.items():
                        if content is not None:
                            dtype = plan.adapters[one.adapter].file.tensors[block.key][0]
                            tensors[f"{planned.name}.{number}.{side}"] = _widened(content, dtype)
                            metrics[side] = dtype
                factors.append(metrics)
            known = {"v_norm": outcome.v_norm, "rank": outcome.rank, "energy": _stored(outcome.energy)}
            document["modules"].append({"name": planned.name, **known, "factors": factors})
            if progress is not None:
                progress.advance(stream.bytes_done, planned.name)
    FILE.save(target, tensors, document)
    return target


class JoinedParts:
    """Starts a stream that yields the outcomes in the part files of a folder.

    Raises:
        CheckpointError: a part is missing, damaged, or was made from something else.
    """

    def __init__(self, folder: Path, pair: dict[str, str]) -> None:
        self.folder, self._pair = folder, pair

    def __call__(self, plan: Plan, settings: Settings, *, keep_projected: bool) -> _Joined:
        """Check the parts, and return the stream."""
        del keep_projected
        found = sorted(self.folder.glob("part-*-of-*.safetensors"))
        if not found:
            raise CheckpointError(f"{self.folder}: holds no part-I-of-N.safetensors; make them with --modules-shard")
        now = _document(plan, self._pair, settings, None)["made_from"]
        indices: dict[int, Path] = {}
        counts: dict[int, Path] = {}
        modules: dict[str, tuple[Path, dict[str, Any]]] = {}
        for path in found:
            with FILE.opened(path) as (document, _):
                check_fields(document, {"made_from": LIST, "modules": LIST, "index": COUNT, "count": COUNT})
                _check_same(path, document["made_from"], now)
                indices[document["index"]] = counts[document["count"]] = path
                for one in document["modules"]:
                    for factors in check_fields(one, MODULE, OF_V)["factors"]:
                        check_fields(factors, {}, FACTORS)
                    modules[one["name"]] = path, one
        if len(counts) > 1:
            (few, first), (many, second) = sorted(counts.items())[:2]
            raise CheckpointError(f"{first} is one of {few} parts, but {second} of {many}; make all with the same N")
        (count,) = counts
        lacking = next((f"{index}/{count}" for index in range(count) if index not in indices), None)
        if lacking or any(module.name not in modules for module in plan.modules):
            raise CheckpointError(
                f"{self.folder}: the parts lack {lacking or 'a module'}; make it with --modules-shard"
            )
        return _Joined(plan, modules)


def _check_same(path: Path, former: list[Any], now: list[Any]) -> None:
    """Raise CheckpointError if a part was made from other adapters, models or settings."""
    changed: dict[str, Any] = {"adapters": (len(former), len(now))} if len(former) != len(now) else {}
    for one, other in zip(former, now, strict=False):
        changed |= differences(check_fields(one, {}), other)
    if changed:
        raise CheckpointError(f"{path}: was made from something else ({changes_text(changed)}); make the part again")


class _Joined:
    """The outcomes of all parts, in the order of the plan."""

    def __init__(self, plan: Plan, modules: dict[str, tuple[Path, dict[str, Any]]]) -> None:
        self.nbytes = self.bytes_done = 0
        self._plan, self._modules = plan, modules

    def __iter__(self) -> Iterator[_Outcome]:
        for index, planned in enumerate(self._plan.modules):
            path, module = self._modules[planned.name]
            with FILE.opened(path) as (_, file):
                pairs = zip(planned.group.factors, module["factors"], strict=True)
                factors = [
                    _Factors(one, path, file, f"{planned.name}.{number}", {"B": block.lora_b, "A": block.lora_a})
                    for number, (block, one) in enumerate(pairs)
                ]
                yield _Outcome(index, module["v_norm"], module.get("rank"), module.get("energy"), factors)

    def close(self) -> None:
        """Nothing is open between outcomes."""


@dataclass(frozen=True)
class _Outcome:
    """The outcome of one module, with the attributes of `_core.JobOutcome`."""

    index: int
    v_norm: float
    rank: int | None
    energy: float | None
    factors: list[_Factors]


class _Factors:
    """The outcome of one adapter in one module, with the attributes of `_core.FactorOutcome`."""

    def __init__(self, metrics: dict[str, Any], path: Path, file: Any, name: str, blocks: dict[str, Slice]) -> None:
        self._metrics, self._path, self._file, self._name, self._blocks = metrics, path, file, name, blocks
        for metric in METRICS:
            setattr(self, metric, math.nan if metrics.get(metric) is None else metrics[metric])

    def projected(self) -> bytes:
        """Return O·B as it was projected.

        Raises:
            AdapterError: a value left the range of its dtype.
        """
        if self._metrics.get("failure") is not None:
            raise AdapterError(self._metrics["failure"])
        return self._values("B")

    def projected_lora_a(self) -> bytes | None:
        """Return the new A, or None if it stays."""
        return None if self._metrics.get("A") is None else self._values("A")

    def _values(self, side: str) -> bytes:
        block, key = self._blocks[side], f"{self._name}.{side}"
        try:
            values, dtype = self._file.get_tensor(key), self._metrics[side]
            if values.dtype != np.float32 or values.size != block.rows * block.cols or dtype not in WIDTHS:
                raise ValueError(
                    f"{key} is {values.dtype} {list(values.shape)}, for {dtype} {[block.rows, block.cols]}"
                )
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self._path}: the {FILE.what} is damaged ({error}); make it again") from error
        return _narrowed(values, dtype)


def _document(plan: Plan, pair: dict[str, str], settings: Settings, shard: Shard | None) -> dict[str, Any]:
    of = [made_from(pair, settings, adapter_digest(adapter.path)) for adapter in plan.adapters]
    return {"made_from": of, "modules": [], "index": shard and shard.index, "count": shard and shard.count}


def _share(plan: Plan, shard: Shard) -> Plan:
    """Return the plan of a shard: the modules whose middle byte lies in its range."""
    mine, done = [], 0
    for module in plan.modules:
        middle = done + module.job.nbytes / 2
        if int(middle * shard.count / plan.nbytes) == shard.index:
            mine.append(module)
        done += module.job.nbytes
    return replace(plan, modules=tuple(mine), nbytes=sum(module.job.nbytes for module in mine))


def _stored(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _widened(content: bytes, dtype: str) -> np.ndarray:
    """Return stored values as float32, exactly."""
    values = np.frombuffer(content, WIDTHS[dtype])
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _narrowed(values: np.ndarray, dtype: str) -> bytes:
    """Return float32 values as the bytes that :func:`_widened` read."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype(WIDTHS[dtype]).tobytes()
