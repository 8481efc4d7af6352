"""`safelora-fast bench`: measure the projection on this machine against numpy, torch and the hardware's limits."""

from __future__ import annotations

import csv
import importlib.util
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from safelora_fast import _core
from safelora_fast.cli.env import cpu_caches, cpu_name
from safelora_fast.errors import SettingsError
from safelora_fast.files.output import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

SHAPES = ((4096, 4096), (3584, 18_944))
RANKS = (4, 8, 16, 32, 64)
ROUNDS = 5
Pair: TypeAlias = "tuple[NDArray[np.uint16], NDArray[np.uint16]]"
Row: TypeAlias = "dict[str, str | int | float]"


def bench(
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Also write the table as CSV, with the CPU and the threads."),
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="Number of threads. (default: all cores)")] = None,
) -> None:
    """Measure the projection of one module in memory on this machine. Takes about a minute and 1 GB of memory.

    read: memory rate as a share of the rate of plain reads; a projection reads both weights twice. fma: share of the peak
    rate of fused multiply-adds. x numpy, x torch: speedup over the same algebra in float32. Each round measures all of
    them in turn, so a machine that slows down favors none. Close other programs first.
    """
    threads = _core.default_threads() if threads is None else threads
    if not 1 <= threads <= 1024:
        raise SettingsError(f"--threads must lie between 1 and 1024, not {threads}")
    machine: Row = {"cpu": cpu_name(), "caches": cpu_caches(), "threads": threads, "kernels": _core.kernel_level()}
    typer.echo(", ".join(f"{name}: {value}" for name, value in machine.items()))
    typer.echo(f"\n{'module':12} {'rank':>4} {'ms':>7} {'read':>6} {'fma':>6} {'x numpy':>8} {'x torch':>8}")
    rows = []
    for shape in SHAPES:
        pair = _random_pair(*shape)
        for rank in RANKS:
            row = _measure(pair, rank, threads)
            rows.append(row)
            torch = f"{row['times_torch']:8.1f}" if "times_torch" in row else "       –"
            typer.echo(
                f"{row['module']:12} {rank:4} {row['ms']:7.2f} {row['share_of_read']:6.0%} {row['share_of_fma_peak']:6.0%}"
                f" {row['times_numpy']:8.1f} {torch}"
            )
    if csv_file is not None:
        with whole_file(csv_file) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], *machine])
            writer.writeheader()
            writer.writerows(row | machine for row in rows)


def _random_pair(rows: int, columns: int) -> Pair:
    """Return the bits of two random bfloat16 weights [rows, columns] whose relative difference is 0.05."""
    import numpy as np  # here, because --help must stay fast

    rng = np.random.default_rng(0)
    base = rng.standard_normal((rows, columns), np.float32)
    aligned = base + np.float32(0.05) * rng.standard_normal((rows, columns), np.float32)
    return (aligned.view(np.uint32) >> 16).astype(np.uint16), (base.view(np.uint32) >> 16).astype(np.uint16)


def _measure(pair: Pair, rank: int, threads: int) -> Row:
    """Measure one row of the table. Each ratio is the median of the ratios of the rounds."""
    import numpy as np

    rows, columns = pair[0].shape
    lora_b = np.random.default_rng(rank).standard_normal((rows, rank), np.float32)
    projected = np.empty_like(lora_b)
    aligned, base = ((weight.ctypes.data, "BF16", rows, columns, columns) for weight in pair)
    given, result = ((matrix.ctypes.data, "F32", rows, rank, rank, 1) for matrix in (lora_b, projected))
    regions = [(weight.ctypes.data, weight.nbytes) for weight in pair]
    providers = {
        "ours": _timed(lambda: _core.subspace_projection(aligned, base, given, result, threads=threads)),
        "read": lambda: _core.read_seconds(regions, threads),
        "numpy": _timed(lambda: _by_numpy(pair, lora_b)),
    }
    if importlib.util.find_spec("torch") is not None:
        providers["torch"] = _torch(pair, lora_b, threads)
    turns = [{name: seconds() for name, seconds in providers.items()} for _ in range(1 + ROUNDS)][1:]
    peak = max(_core.fma_peak(threads) for _ in range(3))
    flop = 4.0 * rows * columns * rank
    row: Row = {
        "module": f"{rows}x{columns}",
        "rank": rank,
        "ms": 1e3 * statistics.median(turn["ours"] for turn in turns),
        "share_of_read": statistics.median(2 * turn["read"] / turn["ours"] for turn in turns),
        "share_of_fma_peak": statistics.median(flop / turn["ours"] / peak for turn in turns),
    }
    for peer in providers.keys() & {"numpy", "torch"}:
        row[f"times_{peer}"] = statistics.median(turn[peer] / turn["ours"] for turn in turns)
    return row


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def seconds() -> float:
        work()  # warm-up: threads of another provider may still occupy the cores
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return seconds


def _by_numpy(pair: Pair, lora_b: NDArray[np.float32]) -> NDArray[np.float32]:
    import numpy as np

    aligned, base = ((weight.astype(np.uint32) << 16).view(np.float32) for weight in pair)
    v = aligned - base
    return np.asarray(v @ (v.T @ lora_b) / np.linalg.norm(v), np.float32)


def _torch(pair: Pair, lora_b: NDArray[np.float32], threads: int) -> Callable[[], float]:
    import torch

    torch.set_num_threads(threads)
    aligned, base = (torch.from_numpy(weight).view(torch.bfloat16) for weight in pair)
    b, v = torch.from_numpy(lora_b), torch.empty(aligned.shape)

    def work() -> torch.Tensor:
        v.copy_(aligned).sub_(base)
        return torch.mm(v, v.mT @ b).div_(torch.linalg.matrix_norm(v))

    return _timed(work)
