"""Selection of safe examples: scoring with the real 135M model, reading files, and the top k of many scores.

Uses SmolLM2-135M-Instruct and two adapters of rank 16, on conversations of one to six turns. Straightforward code takes
one model and one example at a time, with all logits, in float32.

Times are measured in one process whose allocator keeps its memory. Every round measures each provider in turn, then
only the matrix products of our batches. Ratios are computed within a round. Memory is measured in a separate process
for each provider, in which freed memory is returned at once: the peak minus the memory that stays in use.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from processes import KEEPING, RETURNING, run_script
from safelora_fast.data.rows import top_k
from safelora_fast.files.jsonl import JsonLines
from safelora_fast.selection.candidates import Candidates

if TYPE_CHECKING:
    from collections.abc import Callable

SCRIPT = Path(__file__).parent / "selection_scores.py"
ROUNDS = 2
STRAIGHTFORWARD = "straightforward, float32"
PROVIDERS = (STRAIGHTFORWARD, "ours, float32", "ours, bfloat16")
MEGABYTES = 256
SCORES = 10_000_000


def test_likelihoods(benchmark: Callable[..., None], add_row: Callable[..., None], folder: Path) -> None:
    found: dict[str, Any] = {}
    benchmark.pedantic(lambda: found.update(run_script(SCRIPT, KEEPING, "time", folder, ROUNDS)), rounds=1)
    for provider, seconds in found["seconds"].items():
        ratios = [plain / own for own, plain in zip(seconds, found["seconds"][STRAIGHTFORWARD], strict=True)]
        add_row(
            what=f"likelihoods, {found['rows']} rows, {found['tokens']} tokens, {found['longest']} the longest",
            provider=provider,
            rows_per_second=found["rows"] / statistics.median(seconds),
            times_straightforward=statistics.median(ratios),
            score_off_by=found["off"].get(provider, ""),
        )


def test_memory(benchmark: Callable[..., None], add_row: Callable[..., None], folder: Path) -> None:
    extra: dict[str, float] = {}

    def all_of_them() -> None:
        for provider in PROVIDERS:
            peak = run_script(SCRIPT, RETURNING, "memory", folder, provider)
            extra[provider] = peak["peak_mb"] - peak["before_mb"]

    benchmark.pedantic(all_of_them, rounds=1)
    for provider, megabytes in extra.items():
        share = megabytes / extra[STRAIGHTFORWARD]
        add_row(what="memory", provider=provider, peak_above_weights_mb=megabytes, of_straightforward=share)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of about 600 bytes each."""
    path = tmp_path_factory.mktemp("rows") / "candidates.jsonl"
    random = np.random.default_rng(0)
    words = [f"word{number}" for number in range(500)]
    lines = []
    for number in range(2000):
        turns = [" ".join(random.choice(words, int(random.integers(10, 60)))) for _ in range(2)]
        roles = zip(("user", "assistant"), turns, strict=True)
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in roles], "id": number}))
    block = "\n".join(lines) + "\n"
    with path.open("w") as file:
        for _ in range(MEGABYTES * 1_000_000 // len(block)):
            file.write(block)
    return path


def _read(path: Path) -> int:
    return len(path.read_bytes())


def _lines_only(path: Path) -> int:
    return len(JsonLines(path))


def _loop(path: Path) -> int:
    count = 0
    with path.open("rb") as file:
        for line in file:
            count += isinstance(json.loads(line), dict)
    return count


def test_reading(benchmark: Callable[..., None], add_row: Callable[..., None], candidates: Path) -> None:
    providers = {
        "read() alone": _read,
        "json.loads in a loop": _loop,
        "ours, lines only": _lines_only,
        "ours, every row checked": lambda path: len(Candidates(path)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in providers}

    def all_of_them() -> None:
        for name, work in providers.items():
            start = time.perf_counter()
            assert work(candidates)
            seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(all_of_them, rounds=3)
    size = candidates.stat().st_size
    for provider, times in seconds.items():
        add_row(
            what=f"reading {size / 1e6:.0f} MB", provider=provider, mb_per_second=size / 1e6 / statistics.median(times)
        )


def test_the_best_of_many(benchmark: Callable[..., None], add_row: Callable[..., None]) -> None:
    scores = np.random.default_rng(0).standard_normal(SCORES)
    seconds: dict[str, list[float]] = {"ours": [], "a stable sort": []}

    def both() -> None:
        start = time.perf_counter()
        ours = top_k(scores, 5000)
        middle = time.perf_counter()
        plain = np.argsort(-scores, kind="stable")[:5000]
        seconds["ours"].append(middle - start)
        seconds["a stable sort"].append(time.perf_counter() - middle)
        assert np.array_equal(ours, plain)

    benchmark.pedantic(both, rounds=3)
    for provider, times in seconds.items():
        add_row(what=f"best 5000 of {SCORES:,} scores", provider=provider, seconds=statistics.median(times))
