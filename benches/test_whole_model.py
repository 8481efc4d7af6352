"""A whole model from disk: `safelora-fast project` compared with plain reading of the same files, cold and warm.

Cold: the files were dropped from the page cache first. `--models 0.5b,7b` adds the 7B pair (30 GB of disk).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from checkpoints import QWEN_0_5B, QWEN_7B, Shapes, write_adapter, write_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODELS = {"0.5b": QWEN_0_5B, "7b": QWEN_7B}
READ_SIZE = 1 << 24


@dataclass
class Run:
    """Seconds and peak megabytes of one process."""

    seconds: float
    anonymous: float = 0.0
    resident: float = field(default=0.0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shapes" in metafunc.fixturenames:
        names = metafunc.config.getoption("--models").split(",")
        metafunc.parametrize("shapes", [MODELS[name] for name in names], ids=names, scope="module")


@pytest.fixture(scope="module")
def scratch(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    kept = request.config.getoption("--scratch")
    folder = kept or tmp_path_factory.mktemp("checkpoints")
    yield folder
    if not kept:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def pair(scratch: Path, shapes: Shapes) -> tuple[Path, Path]:
    aligned, base = write_pair(scratch / shapes.name, shapes)
    os.sync()
    return aligned, base


def weights(pair: tuple[Path, Path]) -> list[Path]:
    return [file for folder in pair for file in sorted(folder.glob("*.safetensors"))]


def drop_cache(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: list[Path]) -> Run:
    """Read the files from start to end into one reused buffer."""
    buffer = bytearray(READ_SIZE)
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return Run(time.perf_counter() - start)


def project(pair: tuple[Path, Path], adapters: list[Path], output: Path) -> Run:
    """Run the command line in a separate process and watch its memory."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "safelora_fast", "project", *map(str, adapters)]
    command += [
        "--aligned",
        str(pair[0]),
        "--base",
        str(pair[1]),
        "--output",
        str(output),
        "--select",
        "all",
        "--quiet",
    ]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    run = Run(0.0)
    watcher = threading.Thread(target=watch, args=(process, run))
    watcher.start()
    code = process.wait()
    run.seconds = time.perf_counter() - start
    watcher.join()
    assert code == 0
    return run


def watch(process: subprocess.Popen[bytes], run: Run) -> None:
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            anonymous, file = (int(lines[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile"))
        except (OSError, KeyError):
            return
        run.anonymous, run.resident = max(run.anonymous, anonymous), max(run.resident, anonymous + file)
        time.sleep(0.02)


def fits_in_memory(files: list[Path]) -> bool:
    return sum(file.stat().st_size for file in files) < 0.6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_one_adapter(
    benchmark: Callable[..., None],
    add_row: Callable[..., None],
    scratch: Path,
    shapes: Shapes,
    pair: tuple[Path, Path],
    cache: str,
) -> None:
    files = weights(pair)
    if cache == "warm" and not fits_in_memory(files):
        pytest.skip("the pair does not fit in the page cache of this machine")
    adapter = write_adapter(scratch / f"{shapes.name}-adapter-0", shapes)
    reads: list[Run] = []
    projections: list[Run] = []
    providers = [
        (lambda: read(files), reads),
        (lambda: project(pair, [adapter], scratch / "out"), projections),
    ]

    def both() -> None:
        for measure, runs in providers:
            if cache == "cold":
                drop_cache(files)
            else:
                read(files)
            runs.append(measure())
        # The host may still cache files that this machine dropped, which would always favor the second provider.
        providers.reverse()

    benchmark.pedantic(both, rounds=2 if shapes is QWEN_7B else 4)
    best_read, best = (min(runs, key=lambda run: run.seconds) for runs in (reads, projections))
    add_row(
        model=shapes.name,
        adapters=1,
        cache=cache,
        gigabytes=sum(file.stat().st_size for file in files) / 1e9,
        read_seconds=best_read.seconds,
        project_seconds=best.seconds,
        times_read=best.seconds / best_read.seconds,
        anonymous_mb=best.anonymous,
        resident_mb=best.resident,
    )


def test_ten_adapters_in_one_pass(
    benchmark: Callable[..., None], add_row: Callable[..., None], scratch: Path, shapes: Shapes, pair: tuple[Path, Path]
) -> None:
    adapters = [write_adapter(scratch / f"{shapes.name}-adapter-{i}", shapes, seed=i + 1) for i in range(10)]
    single, together = [], []

    def both() -> None:
        for chosen, runs in ((adapters[:1], single), (adapters, together)):
            drop_cache(weights(pair))
            runs.append(project(pair, chosen, scratch / "out"))

    benchmark.pedantic(both, rounds=1)
    best_single, best = (min(runs, key=lambda run: run.seconds) for runs in (single, together))
    add_row(
        model=shapes.name,
        adapters=10,
        cache="cold",
        project_seconds=best.seconds,
        times_ten_single_runs=best.seconds / (10 * best_single.seconds),
        anonymous_mb=best.anonymous,
        resident_mb=best.resident,
    )
