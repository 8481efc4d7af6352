"""SafeLoRA at several thresholds: one adapter for each, from one pass over the checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safelora_fast.checkpoints.adapter import load_adapter
from safelora_fast.files.output import whole_folder
from safelora_fast.projection.jobs import start_stream
from safelora_fast.projection.project import prepare, run_plan
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
        projected: how many modules are.
        modules: of how many.
        folder: the adapter.
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
    """Project a PEFT adapter with SafeLoRA (Hsu et al. 2024, arXiv 2405.16833) at every threshold.

    Cosine and projected factor of a module do not depend on the threshold, so the checkpoints are streamed once. Each
    adapter is the one that :func:`safelora_fast.project_adapter` makes at its threshold, byte for byte, without report and
    card.

    Args:
        adapter: folder of a PEFT LoRA adapter, or its Hub id.
        aligned: the model that the adapter was trained on: path or Hub id, with `@revision` if need be.
        base: the model before alignment.
        thresholds: cosines from −1 to 1, in any order.
        output: the folder to make; one sub-folder for each threshold.
        overwrite: replace an output that a sweep made.
        progress: told about every module.

    Returns:
        One for each threshold, from the lowest to the highest.

    Raises:
        SafeLoraFastError: any bad input, in one line; nothing is written then.
    """
    settings = [Settings(select="threshold", threshold=threshold) for threshold in sorted(set(thresholds))]
    adapters, target = [load_adapter(adapter)], Path(output)
    plan, (loaded,), _ = prepare(adapters, aligned, base, target, overwrite=overwrite, mark=MARK, copies=len(settings))
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
