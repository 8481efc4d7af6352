"""The base class of measures: settings, inputs, measurement and report columns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from safelora_fast.errors import InterruptedRunError, SafeLoraFastError
from safelora_fast.files.digest import text_digest
from safelora_fast.files.store import plain, write_json
from safelora_fast.models.foreign_errors import first_line
from safelora_fast.recipe.model_stamp import subject_stamp

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from safelora_fast.compare.comparison import CompareConfig
    from safelora_fast.compare.report import Column
    from safelora_fast.compare.runs import Run
    from safelora_fast.compare.statistics import Outcome
    from safelora_fast.compare.workbench import Workbench

INPUTS = "of"  # key of a measurement file: the inputs of the measurement
FAILURE = "failure"  # key of a file or of a part of it: why there is no result
UNFINISHED = "unfinished"  # key of a file: why some parts failed; the next call retries them
DIGESTS = ("sha256", "commit")  # ends of the keys of inputs that are files or models
NOT_FINITE = "the measurement is not finite"
_REGISTRY: dict[str, Measure] = {}


@dataclass(frozen=True)
class Metric:
    """A column of the report whose values are read from the files of a measure.

    Attributes:
        column: the column of the report.
        read: takes the contents of the run's file and the reference's file, and returns the result. A string is the
            reason why there is none; None means that the file has no value.
        of_reference: whether the reference has its own value; otherwise the values are differences from the reference.
        count: takes the contents of all seeds' files, and describes what the value is a share of.
        never_negative: whether negative values are rounding errors, as for a divergence.
        rank: columns of one criterion are sorted by rank, then by the order of the measures.
    """

    column: Column
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], Outcome | str | None]
    of_reference: bool = False
    count: Callable[[Sequence[Mapping[str, Any]]], str] = lambda _contents: ""
    never_negative: bool = False
    rank: int = 0


class Measure(ABC):
    """A measurement of a run, stored in one JSON file. Subclasses that set `name` are registered.

    Attributes:
        name: name of the file.
        title: title shown to users.
        order: measures with a smaller number are taken first.
        settings: keys of `measure:` in the configuration, each with its type and default.
        batched: whether `measure.batch_size` affects memory use.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    order: ClassVar[int]
    settings: ClassVar[Mapping[str, tuple[Any, Any]]] = {}
    batched: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            _REGISTRY[cls.name] = cls()

    def check(self, config: CompareConfig) -> None:  # noqa: B027 - most measures have nothing to check
        """Check the settings of this measure against all others; no model is loaded.

        Raises:
            SettingsError: with the file, the line and the dotted key.
        """

    def check_inputs(self, config: CompareConfig) -> None:  # noqa: B027
        """Check before the first training that files, packages and judges exist.

        Raises:
            SafeLoraFastError: the first one that is missing.
        """

    def training(self, config: CompareConfig) -> Mapping[str, Any] | None:
        """Return recipe changes for a training that only this measure needs; None if it measures the run itself."""
        del config
        return None

    def prepare(self, config: CompareConfig) -> None:  # noqa: B027
        """Write the files that this extra training reads to the comparison's folder."""

    def measured_run(self, run: Run) -> Run:
        """Return the run whose adapter is measured."""
        return run

    @abstractmethod
    def applies(self, run: Run, config: CompareConfig) -> bool:
        """Return whether this run, or the reference, is measured."""

    def inputs(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Return what the result depends on, as plain values: here the model, how it is loaded, and the adapter.

        The adapter of a run whose weights were not kept is the one that its record names.
        """
        settings, measured = bench.settings, self.measured_run(run)
        recorded = {"adapter_sha256": measured.recorded_adapter()} if measured.is_without_weights() else {}
        return {
            "model": settings.model,
            "dtype": settings.dtype,
            "device": settings.device,
            "chat_template": settings.chat_template,
            "template_args": settings.template_args,
            **subject_stamp(settings.model, measured.adapter, settings.chat_template),
            **recorded,
        }

    def work(self, run: Run, bench: Workbench) -> tuple[float, float] | None:
        """Return the tokens that this measurement passes through the layers, and those through the head; None if unknown.

        Tokens of a run's reference count too. The estimate of time before the first training reads it.
        """
        del run, bench
        return None

    @abstractmethod
    def take(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Measure a run or the reference, and return the content of the file.

        Raises:
            SafeLoraFastError: the run cannot be measured.
        """

    def metrics(self, config: CompareConfig, contents: Sequence[Mapping[str, Any]]) -> Sequence[Metric]:
        """Return the columns of the report.

        Args:
            config: the comparison.
            contents: contents of all files of this measure.
        """
        del config, contents
        return ()

    def failed_parts(self, content: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
        """Return the title and reason of each failed part, for a measure without columns."""
        del content
        return ()

    def publish(self, config: CompareConfig, contents: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027
        """Write files beside the report that people work with, from the contents of all files of this measure."""

    def folder(self, run: Run, bench: Workbench) -> Path:
        """Return the folder of unfinished work; other inputs use another folder, so no work is lost."""
        return run.folder / f"{self.name}-{text_digest(self.inputs(run, bench))[:12]}"

    def kept(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Return the content of the file; empty if it was made from other inputs."""
        content = run.read(self.name)
        return content if INPUTS in content and agree(content[INPUTS], plain(self.inputs(run, bench))) else {}

    def is_taken(self, run: Run, bench: Workbench) -> bool:
        """Return whether the file holds the complete result."""
        content = self.kept(run, bench)
        return bool(content) and not {FAILURE, UNFINISHED} & content.keys()

    def take_and_keep(self, run: Run, bench: Workbench) -> str | None:
        """Measure and write the result, or the reason why it is missing or incomplete; return that reason.

        Raises:
            OutputError: the file cannot be written.
            InterruptedRunError: Ctrl-C.
        """
        inputs = plain(self.inputs(run, bench))
        content = self._result(run, bench)
        write_json(run.file(self.name), {INPUTS: inputs, **content})
        return content.get(FAILURE) or content.get(UNFINISHED)

    def _result(self, run: Run, bench: Workbench) -> dict[str, Any]:
        import torch

        try:
            return checked(self.take(run, bench))
        except InterruptedRunError:
            raise
        except SafeLoraFastError as error:
            if not isinstance(error.__cause__, torch.OutOfMemoryError):
                return {FAILURE: str(error)}
            batch = str(error).rpartition(":")[0]  # drop the advice, which is for callers of the function
            said = batch if "out of memory" in batch else _out_of_memory(error.__cause__)
        except torch.OutOfMemoryError as error:
            said = _out_of_memory(error)
        bench.release(reference=True)  # only after the except block, because the error holds tensors
        return {FAILURE: f"{said}: {self._memory_advice(bench)}"}

    def _memory_advice(self, bench: Workbench) -> str:
        settings, advice = bench.settings, []
        if self.batched:
            advice.append(f"lower measure.batch_size, now {bench.config.measure.batch_size}")
        if settings.dtype == "float32":
            advice.append("set measure.dtype to bfloat16")
        if settings.device != "cpu":
            advice.append("set measure.device to cpu")
        return ", or ".join(advice) or "free some of it; the model and its reference are in memory together"


def agree(recorded: Any, now: Any, key: str = "") -> bool:
    """Return whether recorded inputs equal those of today, as far as today's files are on this machine.

    A digest or commit that is None today belongs to an input that is not here: a report can be made from records alone.
    """
    if isinstance(recorded, dict) and isinstance(now, dict):
        if now.get("sha256", "") is None:
            return True  # a file that is not here: nothing else is known of it
        return recorded.keys() == now.keys() and all(agree(recorded[name], now[name], name) for name in recorded)
    return recorded == now or (now is None and key.endswith(DIGESTS))


def registered() -> tuple[Measure, ...]:
    """Return every measure, in the order in which they are taken."""
    return tuple(sorted(_REGISTRY.values(), key=lambda measure: measure.order))


def _out_of_memory(error: BaseException) -> str:
    """Return the allocator's message without its list of processes on the device."""
    return f"out of memory ({'. '.join(first_line(error).split('. ')[:2])})"


def checked(part: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a measurement, or a failure if the part contains NaN or infinity."""
    flaw = not_finite(part)
    return part if flaw is None else {FAILURE: flaw}


def not_finite(content: Any, where: str = "") -> str | None:
    """Return a message about the first NaN or infinity in a measurement; None if all values are finite.

    Args:
        content: plain values.
        where: path of the content within the measurement.
    """
    if isinstance(content, float):
        return None if math.isfinite(content) else f"{NOT_FINITE}: {where or 'it'} is {content}"
    found: list[tuple[str, Any]] = []
    if isinstance(content, Mapping):
        found = [(f"{where}.{key}" if where else str(key), item) for key, item in content.items()]
    elif isinstance(content, list | tuple):
        found = [(f"{where}[{index}]", item) for index, item in enumerate(content)]
    return next((flaw for name, item in found if (flaw := not_finite(item, name)) is not None), None)


def number(value: float | None) -> float:
    """Return a value from a file; null, which stands for NaN or infinity, becomes NaN."""
    return math.nan if value is None else value
