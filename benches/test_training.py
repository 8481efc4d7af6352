"""Cost of the defenses in a training step of a real 135M model, compared with simple code and TRL's divergence.

SmolLM2-135M-Instruct, LoRA of rank 16 on all seven projections, batches of 4 x 256 tokens without padding, AdamW, on
the CPU. Times are measured in one process whose allocator keeps its memory, so that nobody pays for fresh pages. Every
round measures each provider in turn, and ratios are computed within a round. Peak memory is measured in a separate
process for each provider, in which freed memory is returned at once.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from processes import KEEPING, RETURNING, run_script

if TYPE_CHECKING:
    from collections.abc import Callable

SCRIPT = Path(__file__).parent / "training_steps.py"
ROUNDS = 3
OF_WINDOW = ", 20 examples"  # steps of several micro-batches (training_steps.py)
COPY_MB = 538.0  # the second model's weights
SHARES = ("features alone", "projection", "reference forward")
STRAIGHTFORWARD = "straightforward KL"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_step(benchmark: Callable[..., None], add_row: Callable[..., None], folder: Path, dtype: str) -> None:
    found: dict[str, list[float]] = {}
    benchmark.pedantic(lambda: found.update(run_script(SCRIPT, KEEPING, "time", folder, dtype, ROUNDS)), rounds=1)
    for provider, seconds in found.items():
        undefended = found[f"undefended{OF_WINDOW}" if provider.endswith(OF_WINDOW) else "undefended"]
        ratios = [own / plain for own, plain in zip(seconds, undefended, strict=True)]
        add_row(
            what=f"time, {'autocast to bfloat16' if dtype == 'bf16' else 'float32'}",
            provider=provider,
            milliseconds=1e3 * statistics.median(seconds),
            times_undefended=statistics.median(ratios),
            best=min(seconds) / min(undefended),
        )


def test_memory(benchmark: Callable[..., None], add_row: Callable[..., None], folder: Path) -> None:
    providers = [
        "undefended",
        STRAIGHTFORWARD,
        "KL apart",
        "KL shared",
        "KL + features shared",
        "TRL's chunked divergence",
    ]
    peaks: dict[str, float] = {}

    def all_of_them() -> None:
        for provider in providers:
            peaks[provider] = run_script(SCRIPT, RETURNING, "memory", folder, "fp32", provider)["peak_mb"]

    benchmark.pedantic(all_of_them, rounds=1)
    plain = peaks["undefended"]
    most = peaks[STRAIGHTFORWARD] - plain - COPY_MB
    for provider in providers:
        extra = peaks[provider] - plain - (COPY_MB if provider == STRAIGHTFORWARD else 0)
        add_row(
            what="memory, float32",
            provider=provider,
            peak_mb=peaks[provider],
            extra_mb_copy_aside=extra,
            of_straightforward=extra / most,
        )
