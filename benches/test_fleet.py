"""Fleets: `safelora-fast project --from` over many adapters of rank 16, of one layer with the shapes of a 7B model.

`--fleet 100,1000` chooses the numbers of adapters. 1,000 need 7 GB of disk. The aims: V is read once per batch of 16, and
memory does not grow with the number of adapters. Each worker has one thread.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints import QWEN_7B, write_adapter, write_pair
from test_whole_model import Run, watch

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

ONE_LAYER = replace(QWEN_7B, name="qwen2.5-7b-one-layer", layers=1, vocabulary=1024, shards=1)
RANK, BATCH = 16, 16


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    counts = [int(count) for count in metafunc.config.getoption("--fleet").split(",")]
    metafunc.parametrize("workers", [1, 2])
    metafunc.parametrize("count", counts)


def project(words: list[object], workers: int) -> tuple[Run, list[dict[str, int]]]:
    """Run one worker per shard; return the seconds, the largest memory of a worker, and the workers' reports."""
    run, processes = Run(0.0), []
    start = time.perf_counter()
    for index in range(workers):
        command = [sys.executable, "-m", "safelora_fast", "project", *map(str, words), "--shard", f"{index}/{workers}"]
        process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE)
        threading.Thread(target=watch, args=(process, run), daemon=True).start()
        processes.append(process)
    reports = [json.loads(process.communicate()[0]) for process in processes]
    run.seconds = time.perf_counter() - start
    assert [process.returncode for process in processes] == [0] * workers
    return run, reports


def test_fleet(
    benchmark: Callable[..., None],
    add_row: Callable[..., None],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    workers: int,
) -> None:
    scratch = Path(request.config.getoption("--scratch") or tmp_path_factory.mktemp("fleet"))
    aligned, base = write_pair(scratch / ONE_LAYER.name, ONE_LAYER)
    fleet, output = scratch / f"fleet-{count}", scratch / "safe"
    for number in range(count):
        write_adapter(fleet / f"adapter-{number}", ONE_LAYER, rank=RANK, seed=number)
    words = ["--from", fleet, "--aligned", aligned, "--base", base, "--select", "all", "--batch", BATCH, "--threads", 1]
    found = []

    def work() -> None:
        shutil.rmtree(output, ignore_errors=True)
        found.append(project([*words, "--output", output], workers))

    benchmark.pedantic(work, rounds=1)
    run, reports = found[0]
    add_row(
        adapters=count,
        seconds=run.seconds,
        per_second=count / run.seconds,
        workers=workers,
        passes=sum(report["passes"] for report in reports),
        least_passes=sum(-(-len(range(index, count, workers)) // BATCH) for index in range(workers)),
        anonymous_mb=run.anonymous,
        resident_mb=run.resident,
    )
    shutil.rmtree(output)
