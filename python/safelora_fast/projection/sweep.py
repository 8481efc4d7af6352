"""SafeLoRA at several thresholds: one output adapter per threshold, in one pass over the checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safelora_fast.checkpoints.adapter import load_adapter
from safelora_fast.files.output import whole_folder
from safelora_fast.projection.jobs import start_stream
from safelora_fast.projection.module_reports import run_plan
from safelora_fast.projection.project import prepare
from safelora_fast.projection.settings import Settings
from safelora_fast.projection.writer import AdapterWriter, Output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safelora_fast.projection.project import PathLike, Progress


MARK = "thresholds.txt"


@dataclass(frozen=True)
class Swept:
    """The adapter at one threshold.

    Attributes:
        threshold: τ; modules with a cosine of at most τ are projected.
        projected: number of projected modules.
        modules: number of all adapted modules.
        folder: the folder of the adapter.
    """

    threshold: float
    projected: int
    modules: int
    folder: Path


def sweep_thresholds(
    adapter: PathLike,
    *,
    aligned: PathLike,
    base: PathLike,
    thresholds: Sequence[float],
    output: PathLike,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Swept]:
    """Project a PEFT adapter with SafeLoRA (Hsu et al. 2024, arXiv 2405.16833) at each threshold.

    A module's cosine and projected factor do not depend on the threshold, so the checkpoints are streamed once. Each
    adapter equals, byte for byte, the output of :func:`safelora_fast.project_adapter` at its threshold, but has no
    report or card.

    Args:
        adapter: folder of a PEFT LoRA adapter, or its Hub id.
        aligned: path or Hub id (optionally with `@revision`) of the model that the adapter was trained on.
        base: path or Hub id of the model before alignment.
        thresholds: cosines from −1 to 1, in any order.
        output: the folder to create, with one subfolder per threshold.
        overwrite: replace the output of an earlier sweep.
        progress: receives the progress after each module.

    Returns:
        One result per threshold, in ascending order.

    Raises:
        SafeLoraFastError: an input is invalid; the message is one line, and nothing is written.
    """
    settings = [Settings(select="threshold", threshold=threshold) for threshold in sorted(set(thresholds))]
    adapters, target = [load_adapter(adapter)], Path(output)
    plan, (loaded,) = prepare(adapters, aligned, base, target, overwrite=overwrite, mark=MARK, copies=len(settings))
    with whole_folder(target, overwrite=overwrite) as partial:
        writers = [AdapterWriter(loaded, partial / _name(one.effective_threshold)) for one in settings]
        outputs = [Output(0, one, writer) for one, writer in zip(settings, writers, strict=True)]
        run_plan(plan, start_stream(plan, settings[0], keep_projected=True), outputs, progress)
        swept = []
        for one, result in zip(settings, outputs, strict=True):
            modules = result.settled()
            projected, threshold = sum(module.projected for module in modules), one.effective_threshold
            swept.append(Swept(threshold, projected, len(modules), target / _name(threshold)))
        (partial / MARK).write_text("\n".join(one.folder.name for one in swept) + "\n", encoding="utf-8")
    return swept


def _name(threshold: float) -> str:
    return f"threshold-{threshold + 0.0!r}"  # + 0.0: no negative zero
