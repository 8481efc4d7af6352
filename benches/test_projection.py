"""C·B of one module in memory: ours, torch (dense and factored), a plain read of the weights, and the FMA peak.

Every round measures each provider in turn. Ratios are computed within a round, so that drift of the machine favors none
of them. torch writes into memory that it has used before. `--levels avx512,avx2,scalar` measures other kernels.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from safelora_fast import _core
from safelora_fast.ops import subspace_projection

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = [(4096, 4096), (3584, 18_944), (18_944, 3584)]
RANKS = [4, 8, 16, 32, 64, 320]
GEMM_SIZE = 2048
SECONDS_PER_CASE = 4.0
RUNS_ON_END = 3
LEAST_ROUNDS, MOST_ROUNDS = 5, 40


@dataclass(frozen=True)
class Pair:
    """Two bfloat16 weights [out, in], and the memory for torch's V."""

    aligned: torch.Tensor
    base: torch.Tensor
    v: torch.Tensor

    @property
    def regions(self) -> list[tuple[int, int]]:
        return [(weight.data_ptr(), weight.nbytes) for weight in (self.aligned, self.base)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "level" in metafunc.fixturenames:
        given = metafunc.config.getoption("--levels")
        metafunc.parametrize("level", given.split(",") if given else [_core.kernel_level()])
    if "pair" in metafunc.fixturenames:
        names = [f"{rows}x{columns}" for rows, columns in SHAPES]
        metafunc.parametrize("pair", SHAPES, ids=names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest) -> Pair:
    rows, columns = request.param
    generator = torch.Generator().manual_seed(rows)
    base = torch.empty(rows, columns).normal_(std=0.02, generator=generator)
    drift = torch.empty(rows, columns).normal_(std=0.001, generator=generator)
    return Pair((base + drift).bfloat16(), base.bfloat16(), drift)


@pytest.fixture(scope="module")
def dense(pair: Pair) -> tuple[torch.Tensor, float]:
    """C = V·Vᵀ/‖V‖_F in float32, which the published code forms for every module, and the seconds this takes."""
    projector = torch.empty(len(pair.v), len(pair.v))

    def form() -> None:
        v = pair.v.copy_(pair.aligned).sub_(pair.base)
        torch.mm(v, v.mT, out=projector).div_(torch.linalg.matrix_norm(v))

    elapsed = min(seconds(form) for _ in range(2))
    # torch sums squares in float32; with so many small numbers the norm is off by about 0.3 %.
    projector.mul_(torch.linalg.matrix_norm(pair.v) / torch.linalg.matrix_norm(pair.v.double()))
    return projector, elapsed


def factored(pair: Pair, left: torch.Tensor, reduced: torch.Tensor, applied: torch.Tensor) -> None:
    """The same algebra as ours: V in float32, T = VᵀB, S = V·T/‖V‖_F."""
    v = pair.v.copy_(pair.aligned).sub_(pair.base)
    torch.mm(v.mT, left, out=reduced)
    torch.mm(v, reduced, out=applied)
    applied.div_(torch.linalg.matrix_norm(v))


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def warm_seconds(measure: Callable[[], float]) -> float:
    """Return the median of a few runs in a row after a warm-up: another provider's threads may still use the cores."""
    measure()
    return statistics.median(measure() for _ in range(RUNS_ON_END))


@pytest.mark.parametrize("rank", RANKS)
def test_one_module(
    benchmark: Callable[..., None],
    add_row: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    pair: Pair,
    dense: tuple[torch.Tensor, float],
    rank: int,
    level: str,
) -> None:
    monkeypatch.setenv("SAFELORA_FAST_CPU_LEVEL", level)
    threads = _core.default_threads()
    rows, columns = pair.aligned.shape
    left = torch.randn(rows, rank, generator=torch.Generator().manual_seed(rank))
    reduced, applied = torch.empty(columns, rank), torch.empty(rows, rank)
    square = torch.randn(GEMM_SIZE, GEMM_SIZE)
    product = torch.empty_like(square)
    providers: dict[str, Callable[[], float]] = {
        "ours": partial(seconds, partial(subspace_projection, pair.aligned, pair.base, left)),
        "read": partial(_core.read_seconds, pair.regions, threads),
        "factored": partial(seconds, partial(factored, pair, left, reduced, applied)),
        "gemm": partial(seconds, partial(torch.mm, square, square, out=product)),
    }
    times: dict[str, list[float]] = {name: [] for name in providers}
    peaks: list[float] = []

    def measure(rounds: int) -> None:
        for _ in range(rounds):
            for name, work in providers.items():
                times[name].append(warm_seconds(work))
            peaks.append(_core.fma_peak(threads))

    measure(1)
    projector, dense_seconds = dense
    dense_seconds += seconds(partial(torch.mm, projector, left, out=applied))
    assert (subspace_projection(pair.aligned, pair.base, left) - applied).norm() <= 1e-5 * applied.norm()
    one_round = (1 + RUNS_ON_END) * sum(values[-1] for values in times.values())
    rounds = min(max(int(SECONDS_PER_CASE / one_round), LEAST_ROUNDS), MOST_ROUNDS)
    for values in times.values():
        values.clear()
    benchmark.pedantic(measure, args=(rounds,), rounds=1)

    flop = 4.0 * rows * columns * rank
    peak = max(peaks)

    def middle(of: Callable[[float, float, float, float], float]) -> float:
        four = zip(times["read"], times["ours"], times["factored"], times["gemm"], strict=True)
        return statistics.median(of(*values) for values in four)

    add_row(
        shape=f"{rows}x{columns}",
        rank=rank,
        level=level,
        ms=1e3 * statistics.median(times["ours"]),
        read_gb_s=middle(lambda read, *_: 1e-9 * sum(size for _, size in pair.regions) / read),
        share_of_read_per_pass=middle(lambda read, ours, *_: 2 * read / ours),
        fma_peak_gflop_s=1e-9 * peak,
        share_of_fma_peak=middle(lambda _read, ours, *_: flop / ours / peak),
        times_torch_gemm_rate=middle(lambda _read, ours, _factored, gemm: (flop / ours) / (2.0 * GEMM_SIZE**3 / gemm)),
        times_factored=middle(lambda _read, ours, peer, _gemm: peer / ours),
        times_dense=dense_seconds / statistics.median(times["ours"]),
    )
