"""Interleaving: mixing safe general examples into the task examples (Kaczér et al., arXiv 2508.06249)."""

from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from safelora_fast.data.formats import like_task
from safelora_fast.data.schedule import Schedule
from safelora_fast.errors import DataError, SettingsError
from safelora_fast.files.argument_checks import whole_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from fractions import Fraction

SAFE = "safe"
READ_AT_ONCE = 64
Data = TypeVar("Data")


def interleave(
    task: Data, safe: Any, fraction: float | Fraction = 0.05, *, seed: int = 0, epochs: int = 1, column: str = SAFE
) -> Data:
    """Mix safe examples into task examples, and tag each example.

    `fraction` is the number of safe examples per task example, as in the paper: 0.05 adds 5 examples to 100. At the end
    of each pass the count is exactly round(fraction · task examples); before that it lags by less than two examples.
    Every safe example is used once before any is repeated. Task examples keep their order. The same arguments give the
    same mixture. A task stream with safe examples in memory gives the same mixture as a task in memory.

    Safe examples in memory come in a random order that changes with each repetition. Those of a stream come in the
    stream's order, with its epoch incremented for each repetition. A mixture stream is read by one DataLoader worker,
    so that the count stays exact; `state_dict` and `split_dataset_by_node` work as usual.

    Args:
        task: a list of dictionaries, a `datasets.Dataset` or a `datasets.IterableDataset`.
        safe: likewise, not necessarily of the same kind. Examples in another format are converted to the task's format
            if that is unambiguous: prompt and completion become messages, and text becomes turns if the task has turns.
        fraction: safe examples per task example, at least 0.
        seed: seed for the positions and the order of safe examples.
        epochs: passes over the task examples, one after another. Each pass continues with the next safe examples. A
            trainer that makes its own passes over the mixture sees the same safe examples in each.
        column: name of the tag column, true for safe examples.

    Returns:
        A mixture of the same kind as `task`, or a stream if `safe` is one.

    Raises:
        SettingsError: fraction, seed or epochs are out of range, or a kind of data is unknown.
        DataError: there are no examples, the fraction gives no safe example, the tag column exists, a column has two
            types, or safe examples cannot be converted to the task's format.
    """
    schedule = Schedule(fraction, seed)
    if whole_number("interleave: epochs", epochs) < 1:
        raise SettingsError(f"interleave: epochs is {epochs}, it must be at least 1")
    kinds = _kind("task", task), _kind("safe", safe)
    for role, data, kind in (("task", task, kinds[0]), ("safe", safe, kinds[1])):
        if kind != "stream" and not len(data):  # type: ignore[arg-type]
            raise DataError(f"interleave: {role} holds no examples")
        _check_column(role, data, kind, column)
    if kinds[0] != "stream" and fraction and not schedule.due(len(task) * epochs):  # type: ignore[arg-type]
        raise DataError(f"interleave: {_no_safe_example(fraction, len(task) * epochs)}")  # type: ignore[arg-type]
    safe = like_task(task, safe, kinds)
    mixture = _Mixture(task, safe, kinds, schedule, fraction, epochs, column)
    result: Any
    if "stream" in kinds:
        result = mixture.stream()
    elif "table" in kinds:
        result = mixture.table()
    else:
        result = [{**example, column: is_safe} for is_safe, example in mixture.examples()]
    return result  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Mixture:
    """The data and settings of a mixture; `kinds` are "list", "table" or "stream"."""

    task: Any
    safe: Any
    kinds: tuple[str, str]
    schedule: Schedule
    fraction: float | Fraction
    epochs: int
    column: str

    def examples(self) -> Iterator[tuple[bool, Mapping[str, Any]]]:
        """Yield (is_safe, example), read lazily."""
        if self.kinds[0] == "stream":
            passes = (_read("task", self.task, epoch) for epoch in range(self.epochs))
        else:
            passes = (iter(self.task) for _ in range(self.epochs))
        return self.schedule.weave(passes, self._safe_examples())

    def _safe_examples(self) -> Iterator[Mapping[str, Any]]:
        if self.kinds[1] == "stream":
            for repetition in count():
                yield from _read("safe", self.safe, repetition)
        yield from (self.safe[index] for index in self.schedule.orders(len(self.safe)))

    def table(self) -> Any:
        """Return a Dataset of indices into both tables, without copying examples."""
        import datasets

        tables = [
            data if kind == "table" else _as_table(role, data)
            for role, data, kind in zip(("task", "safe"), (self.task, self.safe), self.kinds, strict=True)
        ]
        features = _common_features(tables, self.column)
        tagged = []
        for is_safe, table in enumerate(tables):
            missing = [name for name in features if name not in table.column_names and name != self.column]
            for name in missing:
                table = table.add_column(name, [None] * len(table), feature=features[name])  # noqa: PLW2901
            table = table.add_column(self.column, np.full(len(table), bool(is_safe)))  # noqa: PLW2901
            tagged.append(table.select_columns(list(features)))
        safe = (len(self.task) + index for index in self.schedule.orders(len(self.safe)))
        passes = (range(len(self.task)) for _ in range(self.epochs))
        order = [index for _, index in self.schedule.weave(passes, safe)]
        return datasets.concatenate_datasets(tagged).select(order)

    def stream(self) -> Any:
        """Return an IterableDataset with one shard."""
        import datasets

        # Reading sets a stream's epoch, so copies are read and the caller's streams do not change.
        task, safe = (
            copy.deepcopy(data) if kind == "stream" else data
            for data, kind in zip((self.task, self.safe), self.kinds, strict=True)
        )
        features = None
        if all(getattr(data, "features", None) is not None for data in (task, safe)):
            features = _common_features([task, safe], self.column)
        mixture = replace(self, task=task, safe=safe)
        return datasets.IterableDataset.from_generator(_tagged, features=features, gen_kwargs={"mixture": mixture})


def _tagged(mixture: _Mixture) -> Iterator[dict[str, Any]]:
    counts = [0, 0]
    for is_safe, example in mixture.examples():
        counts[is_safe] += 1
        if mixture.column in example:  # a stream's columns may be unknown until it is read
            raise _taken("safe" if is_safe else "task", mixture.column)
        yield {**example, mixture.column: is_safe}
    if mixture.fraction and not counts[1]:
        warnings.warn(f"interleave: {_no_safe_example(mixture.fraction, counts[0])}", stacklevel=2)


def _no_safe_example(fraction: float | Fraction, tasks: int) -> str:
    return f"fraction {fraction} of {tasks:,} task examples is less than one safe example; raise it"


def _read(role: str, stream: Any, epoch: int) -> Iterator[dict[str, Any]]:
    """Yield all examples of a stream in one epoch, also inside a DataLoader worker."""
    stream.set_epoch(epoch)
    empty = True
    for batch in stream.iter(READ_AT_ONCE):  # plain iteration would skip other workers' shards
        for index in range(len(next(iter(batch.values()), []))):
            empty = False
            yield {name: values[index] for name, values in batch.items()}
    if empty:
        raise DataError(f"interleave: {role} holds no examples")


def _kind(role: str, data: Any) -> str:
    """Return "list", "table" or "stream"; `datasets` is imported only if the caller has imported it."""
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(data, datasets.IterableDataset):
        return "stream"
    if datasets is not None and isinstance(data, datasets.Dataset):
        return "table"
    if isinstance(data, list | tuple) and all(isinstance(row, dict) for row in data):
        return "list"
    raise SettingsError(
        f"interleave: {role} is {type(data).__name__}: give a list of dictionaries, a datasets.Dataset or an IterableDataset"
        " (of a DatasetDict, one split)"
    )


def _check_column(role: str, data: Any, kind: str, column: str) -> None:
    names = {name for row in data for name in row} if kind == "list" else set(data.column_names or ())
    if column in names:
        raise _taken(role, column)


def _taken(role: str, column: str) -> DataError:
    return DataError(f"interleave: {role} has a column {column} already: give the tag another name, column=")


def _as_table(role: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return a Dataset with the columns of all examples; `Dataset.from_list` takes only those of the first."""
    import datasets

    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except (ValueError, TypeError, OverflowError) as error:  # includes Arrow's errors
        raise DataError(f"interleave: {role} makes no table: {error}") from error


def _common_features(tables: list[Any], column: str) -> Any:
    """Return the features of both tables and of the tag column."""
    import datasets

    task, safe = (table.features for table in tables)
    for name in task:
        if name in safe and task[name] != safe[name]:
            raise DataError(
                f"interleave: column {name} is {task[name]} in task and {safe[name]} in safe: make them alike"
            )
    return datasets.Features({**task, **safe, column: datasets.Value("bool")})
