"""Write one shard of a projected model: the bytes of the fine-tuned shard, with the modules replaced.

Header, order and dtypes stay those of the fine-tuned file. A shard counts once its record exists, which is written
after the shard is on the disk.
"""

from __future__ import annotations

import contextlib
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safelora_fast import _core
from safelora_fast.errors import SettingsError
from safelora_fast.files.json_reader import COUNT, LIST, NUMBER, check_fields, read_object
from safelora_fast.files.output import sync
from safelora_fast.files.store import write_json
from safelora_fast.subspace.subspace_pair import leading
from safelora_fast.whole_models.plan import WIDTHS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from safelora_fast.checkpoints.sources import TensorEntry
    from safelora_fast.projection.settings import Settings
    from safelora_fast.whole_models.plan import WholeModule

PIECE = 64 << 20
NORMS = ("v_norm", "update_norm", "update_norm_projected")
METRICS = (*NORMS, "rank", "energy", "cosine")


def project_module(module: WholeModule, settings: Settings, output: np.ndarray) -> dict[str, Any]:
    """Write W_a + O·(W_ft − W_a) of one module to `output` (uint8), as stored, and return its metrics.

    With the module's subspace, the metrics of V are those that the subspace holds.

    Raises:
        CheckpointError: a weight is NaN or infinite, or the result leaves the range of its dtype.
        SettingsError: the system cannot start that many threads.
    """
    known: dict[str, Any] = {}
    vectors = None
    if module.subspace is not None:
        basis, values = leading(module.name, module.subspace, settings)
        vectors = np.ascontiguousarray(basis.T, np.float32)  # [k, m]
        v_norm = module.subspace.v_norm
        energy = float(np.square(values / v_norm).sum()) if v_norm else None
        known = {"v_norm": v_norm, "rank": len(values), "energy": energy}
    try:
        outcome = _core.project_update(
            module.planned.job,
            [block.view() for block in module.finetuned],
            settings.described_operator.in_rust(vars(settings)),
            (output.ctypes.data, output.nbytes),
            cosine=needs_cosine(settings),
            vectors=None if vectors is None else (vectors.ctypes.data, len(vectors)),
            threads=settings.threads,
        )
    except RuntimeError as error:
        raise SettingsError(f"{error}; ask for fewer with threads") from error
    return {name: getattr(outcome, name) for name in METRICS} | known


def needs_cosine(settings: Settings) -> bool:
    """Return whether the paper's cosine is computed: if it selects, or comes with C·Δ anyway."""
    return settings.select != "all" or settings.operator == "safelora"


def write_shard(
    source: Path,
    target: Path | None,
    modules: Sequence[WholeModule],
    settings: Settings,
    buffers: tuple[np.ndarray, np.ndarray],
    *,
    keeps: Callable[[dict[str, Any]], bool],
    told: Callable[[WholeModule], None],
) -> list[dict[str, Any]]:
    """Write a shard, and return the metrics of its modules.

    Args:
        source: the fine-tuned file.
        target: the file to write; None only computes the metrics.
        modules: the modules in the file, in the order of their bytes.
        settings: the operator.
        buffers: two of the size of the largest module: one is written while the other is filled.
        keeps: whether the projected weight of a module with these metrics is written. Otherwise its bytes stay.
        told: called after each module.
    """
    metrics = []
    with contextlib.ExitStack() as stack:
        reader = os.open(source, os.O_RDONLY)
        stack.callback(os.close, reader)
        writer = None
        if target is not None:
            writer = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            stack.callback(os.close, writer)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        pending: Future[None] | None = None
        done = 0
        for index, module in enumerate(modules):
            _announce(modules[index + 1 : index + 2])
            values = buffers[index % 2][: module.nbytes]
            found = project_module(module, settings, values)
            metrics.append(found)
            if writer is not None:
                if pending is not None:
                    pending.result()
                kept = values if keeps(found) else None
                pending = pool.submit(_write, reader, writer, done, module, kept)
                done = module.begin + module.nbytes
            told(module)
        if pending is not None:
            pending.result()
        if writer is not None:
            copy_range(reader, writer, done, os.fstat(reader).st_size - done)
    return metrics


def finish_shard(target: Path, record: Path, content: dict[str, Any]) -> None:
    """Put a written shard on the disk, then its record."""
    sync(target)
    write_json(record, content)


def read_record(record: Path, shard: Path, source: Path, count: int) -> list[dict[str, Any]] | None:
    """Return the metrics of a finished shard's modules; None if it is not finished, or not whole, and must be written."""
    try:
        modules = check_fields(read_object(record), {"modules": LIST})["modules"]
        if len(modules) != count or shard.stat().st_size != source.stat().st_size:
            return None
        for one in modules:
            check_fields(one, dict.fromkeys(NORMS, NUMBER), {"rank": COUNT, "energy": NUMBER, "cosine": NUMBER})
    except (OSError, ValueError):
        return None
    found = [{name: one.get(name) for name in METRICS} for one in modules]
    return [one | {"cosine": math.nan if one["cosine"] is None else one["cosine"]} for one in found]


def restore(source: Path, target: Path, modules: Sequence[WholeModule]) -> None:
    """Put the fine-tuned bytes of these modules back into a written shard."""
    reader, writer = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR)
    try:
        for module in modules:
            copy_range(reader, writer, module.begin, module.nbytes)
        os.fsync(writer)
    finally:
        os.close(reader)
        os.close(writer)


def replace_tensors(target: Path, replaced: Iterable[tuple[TensorEntry, TensorEntry]]) -> None:
    """Replace tensors of a written shard, each by the bytes of another one of the same shape and dtype."""
    with target.open("r+b") as writer:
        for own, other in replaced:
            with Path(other.file.path).open("rb") as reader:
                copy_range(reader.fileno(), writer.fileno(), own.begin, own.end - own.begin, other.begin - own.begin)


def copy_range(reader: int, writer: int, begin: int, count: int, shift: int = 0) -> None:
    """Copy bytes between two open files, from `shift` bytes behind the place where they go."""
    end = begin + count
    while begin < end:
        content = os.pread(reader, min(PIECE, end - begin), begin + shift)
        if not content:
            raise OSError(0, "the file became shorter while it was copied")
        _put(writer, content, begin)
        begin += len(content)


def _write(reader: int, writer: int, done: int, module: WholeModule, values: np.ndarray | None) -> None:
    """Copy what lies before a module, and write its new bytes, or copy the former ones."""
    copy_range(reader, writer, done, module.begin - done + (module.nbytes if values is None else 0))
    if values is not None:
        _put(writer, values, module.begin)


def _put(writer: int, content: Any, begin: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(writer, view[:PIECE], begin)
        begin, view = begin + written, view[written:]


def _announce(modules: Sequence[WholeModule]) -> None:
    """Ask the system to read the weights of modules ahead of time."""
    for module in modules:
        group = module.planned.group
        for block in (*module.finetuned, *group.aligned, *(() if module.subspace else group.base)):
            width = WIDTHS[block.dtype]
            with contextlib.suppress(OSError):
                descriptor = os.open(block.file.path, os.O_RDONLY)
                try:
                    begin = block.begin + block.offset * width
                    os.posix_fadvise(descriptor, begin, block.rows * block.cols * width, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)
