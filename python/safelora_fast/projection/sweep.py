"""SafeLoRA at several thresholds: one adapter for each, from one pass over the checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safelora_fast.checkpoints.adapter import load_adapter
from safelora_fast.checkpoints.sources import open_checkpoint
from safelora_fast.files.output import check_target, whole_folder
from safelora_fast.projection.jobs import refuse_equal, start_stream
from safelora_fast.projection.plan import plan_projection
from safelora_fast.projection.settings import Settings, chosen
from safelora_fast.projection.writer import AdapterWriter
from safelora_fast.projection.written_keys import settled_adapters

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
    loaded, target = load_adapter(adapter), Path(output)
    inputs = [loaded.path, *(path for path in map(Path, (aligned, base)) if path.exists())]
    check_target(target, inputs, overwrite=overwrite, nbytes=loaded.file.size * len(settings), mark=MARK)
    models = open_checkpoint(aligned, role="aligned"), open_checkpoint(base, role="base")
    plan = plan_projection([loaded], *models)
    (loaded,) = settled_adapters(plan, models[0])
    with whole_folder(target, overwrite=overwrite) as partial:
        writers = [AdapterWriter(loaded, partial / _name(one.effective_threshold)) for one in settings]
        cosines: dict[str, float] = {}
        norms: list[float] = []
        stream = start_stream(plan, Settings(), keep_projected=True)
        if progress is not None:
            progress.start(plan.nbytes, len(plan.modules))
        try:
            for outcome in stream:
                planned = plan.modules[outcome.index]
                norms.append(outcome.v_norm)
                for place, factor in zip(planned.targets, outcome.factors, strict=True):
                    cosines[planned.name] = factor.cosine
                    selecting = [
                        writer
                        for writer, one in zip(writers, settings, strict=True)
                        if chosen({planned.name: factor.cosine}, one)
                    ]
                    block = factor.projected() if selecting else b""
                    for writer in selecting:
                        writer.write(place, block)
                if progress is not None:
                    progress.advance(stream.bytes_done, planned.name)
        finally:
            stream.close()
        refuse_equal(norms)
        names = [writer.folder.name for writer in writers]
        (partial / MARK).write_text("\n".join(names) + "\n", encoding="utf-8")
    return [
        Swept(one.effective_threshold, len(chosen(cosines, one)), len(cosines), target / _name(one.effective_threshold))
        for one in settings
    ]


def _name(threshold: float) -> str:
    return f"threshold-{threshold + 0.0!r}"  # + 0.0: no negative zero
