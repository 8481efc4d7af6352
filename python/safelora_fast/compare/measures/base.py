"""What a measure is: the settings that ask for it, what its result depends on, how it is taken, and its columns."""

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

    from safelora_fast.compare.config import CompareConfig
    from safelora_fast.compare.report import Column
    from safelora_fast.compare.runs import Run
    from safelora_fast.compare.statistics import Outcome
    from safelora_fast.compare.workbench import Workbench

INPUTS = "of"  # key of a measurement file: what the measurement was made from
FAILURE = "failure"  # key of a file, or of a part of it: why there is no result
UNFINISHED = "unfinished"  # key of a file: why some parts failed that the next call may measure
NOT_FINITE = "the measurement is not finite"
_REGISTRY: dict[str, Measure] = {}


@dataclass(frozen=True)
class Metric:
    """A column of the report whose values are read from the files of a measure.

    Attributes:
        column: of the report.
        read: from the content of a run's file and of the reference's to the result; a text says why there is none, None
            that the file has none.
        of_reference: whether the reference has a value of its own; otherwise runs are compared with it.
        count: from the contents of all seeds' files to what the value is a share of, in words.
        never_negative: whether values below zero are rounding, as of a divergence.
        rank: columns of one criterion stand by rank, then in the order of the measures.
    """

    column: Column
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], Outcome | str | None]
    of_reference: bool = False
    count: Callable[[Sequence[Mapping[str, Any]]], str] = lambda _contents: ""
    never_negative: bool = False
    rank: int = 0


class Measure(ABC):
    """A measurement of a run, kept in one JSON file. A subclass that sets `name` is registered.

    Attributes:
        name: of the file.
        title: for people.
        order: measures with a smaller number are taken first.
        settings: keys of `measure:` in the configuration, each with its type and default.
        batched: whether `measure.batch_size` decides how much memory it needs.
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
        """Refuse settings that do not fit the others; no model is loaded.

        Raises:
            SettingsError: with the file, the line and the dotted key.
        """

    def check_inputs(self, config: CompareConfig) -> None:  # noqa: B027
        """Refuse before the first training what would fail after hours: files, packages, judges that are not there.

        Raises:
            SafeLoraFastError: the first that is missing.
        """

    def training(self, config: CompareConfig) -> Mapping[str, Any] | None:
        """Changes of the recipe for a training that only this measure needs; None if it measures the run itself."""
        del config
        return None

    def prepare(self, config: CompareConfig) -> None:  # noqa: B027
        """Write into the comparison's folder what that training reads."""

    def measured_run(self, run: Run) -> Run:
        """The run whose adapter is measured."""
        return run

    @abstractmethod
    def applies(self, run: Run, config: CompareConfig) -> bool:
        """Whether this run, or the reference, is measured."""

    def inputs(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """What the result depends on, as plain values: here the model as it is loaded, and the adapter."""
        settings = bench.settings
        return {
            "model": settings.model,
            "dtype": settings.dtype,
            "device": settings.device,
            "chat_template": settings.chat_template,
            "template_args": settings.template_args,
            **subject_stamp(settings.model, self.measured_run(run).adapter, settings.chat_template),
        }

    @abstractmethod
    def take(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """Measure a run, or the reference; the result is the content of the file.

        Raises:
            SafeLoraFastError: it cannot be measured.
        """

    def metrics(self, config: CompareConfig, contents: Sequence[Mapping[str, Any]]) -> Sequence[Metric]:
        """Columns of the report.

        Args:
            config: the comparison.
            contents: of all files of this measure.
        """
        del config, contents
        return ()

    def failed_parts(self, content: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
        """Title and reason of each part that failed, of a measure without columns."""
        del content
        return ()

    def folder(self, run: Run, bench: Workbench) -> Path:
        """Where unfinished work is kept; other inputs have another folder, so nothing is lost."""
        return run.folder / f"{self.name}-{text_digest(self.inputs(run, bench))[:12]}"

    def kept(self, run: Run, bench: Workbench) -> dict[str, Any]:
        """The content of the file; empty if it was made from other inputs."""
        content = run.read(self.name)
        return content if INPUTS in content and content[INPUTS] == plain(self.inputs(run, bench)) else {}

    def is_taken(self, run: Run, bench: Workbench) -> bool:
        """Whether the file has the whole result."""
        content = self.kept(run, bench)
        return bool(content) and not {FAILURE, UNFINISHED} & content.keys()

    def take_and_keep(self, run: Run, bench: Workbench) -> str | None:
        """Measure, and write the result or why there is none, or not all of it; returns that reason.

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
            batch = str(error).rpartition(":")[0]  # what follows is advice for callers of the function
            said = batch if "out of memory" in batch else _out_of_memory(error.__cause__)
        except torch.OutOfMemoryError as error:
            said = _out_of_memory(error)
        bench.release(reference=True)  # not before the error, which holds tensors, is gone
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


def registered() -> tuple[Measure, ...]:
    """Every measure, in the order in which they are taken."""
    return tuple(sorted(_REGISTRY.values(), key=lambda measure: measure.order))


def _out_of_memory(error: BaseException) -> str:
    """The allocator's own words, without those on every process of the device."""
    return f"out of memory ({'. '.join(first_line(error).split('. ')[:2])})"


def checked(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a measurement, or that it is not finite."""
    flaw = not_finite(part)
    return part if flaw is None else {FAILURE: flaw}


def not_finite(content: Any, where: str = "") -> str | None:
    """The first NaN or infinity of a measurement, in words; None if all is finite.

    Args:
        content: plain values.
        where: the place of the content in the whole.
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
    """A value of a file, in which null stands for what is not finite."""
    return math.nan if value is None else value
