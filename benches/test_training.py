"""Cost of the defenses in a training step of a real model, compared with simple code and TRL's divergence.

SmolLM2-135M-Instruct, or the model of `--model FOLDER`; LoRA of rank 16 on all seven projections, batches of 4 x 256
tokens without padding, AdamW, on the CPU. Times are measured in one process whose allocator keeps its memory, so that
nobody pays for fresh pages. Every round measures each provider in turn, and ratios are computed within a round: of the
time, and of the CPU time of all threads, which says more when other work shares the machine. Peak memory is measured in
a separate process for each provider, in which freed memory is returned at once.
"""

from __future__ import annotations

import statistics
from operator import truediv
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
def test_step(
    benchmark: Callable[..., None],
    add_row: Callable[..., None],
    folder: Path,
    dtype: str,
    request: pytest.FixtureRequest,
) -> None:
    found: dict[str, list[tuple[float, float]]] = {}
    chosen = filter(None, request.config.getoption("--providers").split(";"))
    benchmark.pedantic(
        lambda: found.update(run_script(SCRIPT, KEEPING, "time", folder, dtype, ROUNDS, *chosen)), rounds=1
    )
    for provider, times in found.items():
        plain = found[f"undefended{OF_WINDOW}" if provider.endswith(OF_WINDOW) else "undefended"]
        (seconds, cpu), (plain_seconds, plain_cpu) = zip(*times, strict=True), zip(*plain, strict=True)
        add_row(
            model=folder.name,
            what=f"time, {'autocast to bfloat16' if dtype == 'bf16' else 'float32'}",
            provider=provider,
            milliseconds=1e3 * statistics.median(seconds),
            times_undefended=statistics.median(map(truediv, seconds, plain_seconds)),
            times_undefended_cpu=statistics.median(map(truediv, cpu, plain_cpu)),
            best=min(seconds) / min(plain_seconds),
        )


def test_memory(
    benchmark: Callable[..., None], add_row: Callable[..., None], folder: Path, request: pytest.FixtureRequest
) -> None:
    if request.config.getoption("--model"):
        pytest.skip("the size of the second model is that of the 135M model")
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
