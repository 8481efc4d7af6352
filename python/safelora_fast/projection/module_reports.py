"""Run the stream over a plan: the outcomes become module reports and written factors."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

from safelora_fast.checkpoints.weight_norms import weight_norm
from safelora_fast.projection.jobs import refuse_equal
from safelora_fast.projection.report import ModuleReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.projection.jobs import Plan, Stream
    from safelora_fast.projection.writer import FactorOutcome, Output


class Progress(Protocol):
    """Receives the amount of work once, and the progress after each module."""

    def start(self, total_bytes: int, modules: int) -> None:
        """Begin a run over `modules` modules and `total_bytes` bytes; called before the first byte is read."""

    def advance(self, done_bytes: int, module: str) -> None:
        """Report the bytes processed so far; called after each module."""


def run_plan(plan: Plan, stream: Stream, outputs: Sequence[Output], progress: Progress | None) -> None:
    """Run the stream, and add each module to the outputs of its adapters.

    Raises:
        PairingError: aligned and base hold the same weights in all modules.
        SafeLoraFastError: a weight or factor is NaN or infinite.
    """
    norms = []
    with contextlib.closing(stream):
        if progress is not None:
            progress.start(stream.nbytes, len(plan.modules))
        for outcome in stream:
            planned = plan.modules[outcome.index]
            norms.append(outcome.v_norm)
            weight = weight_norm(planned.group.aligned) if planned.group.aligned else 0.0  # none: V is known otherwise
            results: Sequence[FactorOutcome] = outcome.factors
            for factors, found in zip(planned.group.factors, results, strict=True):
                report = ModuleReport(
                    name=planned.name,
                    cosine=found.cosine,
                    projected=False,
                    reason="",
                    gain=found.gain,
                    rank=factors.lora_b.cols,
                    b_norm=found.lora_b_norm,
                    b_norm_after=found.lora_b_norm_projected,
                    update_norm=found.update_norm,
                    update_norm_after=found.update_norm_projected,
                    v_norm=outcome.v_norm,
                    v_rank=outcome.rank,
                    v_energy=outcome.energy,
                    sources=[asdict(source) for source in planned.sources],
                    v_ratio=outcome.v_norm / weight if weight else math.nan,
                    merge_error=getattr(found, "error", None),
                )
                for output in outputs:
                    if output.adapter == factors.adapter:
                        output.add(report, factors, found)
            if progress is not None:
                progress.advance(stream.bytes_done, planned.name)
    refuse_equal(norms)
