"""Reading the examples of a data set: a local JSONL file or a Hub data set."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np

from safelora_fast.checkpoints.hub import is_within_reach, offline_unless
from safelora_fast.checkpoints.resolver import did_you_mean
from safelora_fast.errors import DataError
from safelora_fast.files.json_reader import NUMBER
from safelora_fast.files.jsonl import JsonLines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from numpy.typing import ArrayLike

Message: TypeAlias = "dict[str, str]"
HUB_DATA = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]+))?")
ROLES = ("system", "developer", "user", "assistant", "tool")
USED = {"messages", "prompt", "completion"}


@dataclass(frozen=True)
class Row:
    """One checked example.

    Attributes:
        place: its location, for error messages ("train.jsonl:12").
        prompt: text or turns before the completion.
        completion: text, or the turns after the prompt. An example with `messages` has all its turns here, and an empty
            prompt.
    """

    place: str
    prompt: str | list[Message]
    completion: str | list[Message]


@dataclass(frozen=True)
class RowSet:
    """The examples of one data set.

    Attributes:
        source: the data set's name in the recipe.
        sha256: digest of the file, or of a Hub data set's examples as canonical JSON.
        rows: the examples that were kept, in source order.
        total: number of examples in the source; `rows` may hold fewer.
        unused: names of columns that are not used.
    """

    source: str
    sha256: str
    rows: Sequence[Row]
    total: int
    unused: list[str] = field(default_factory=list)


class LazyRows(Sequence[Row]):
    """Examples that are read on access: all at once would take many times the memory of their file.

    Args:
        count: number of examples.
        read: returns the example at an index.
    """

    def __init__(self, count: int, read: Callable[[int], Row]) -> None:
        self._count = count
        self._read = read

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        chosen = range(self._count)[index]
        return self._read(chosen) if isinstance(chosen, int) else chosen_rows(self, chosen)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]


def chosen_rows(rows: Sequence[Row], numbers: Iterable[int]) -> LazyRows:
    """Return the examples at the given indices."""
    kept = array("q", numbers)
    return LazyRows(len(kept), lambda number: rows[kept[number]])


def read_rows(source: str, most: int | None = None, *, best: int | None = None) -> RowSet:
    """Read a data set; an existing file takes precedence over a Hub data set of the same name.

    Args:
        source: a JSONL file, or a Hub data set id[@revision][:split]; the default split is "train".
        most: keep only the first `most` examples. The rest of a file is checked too; the rest of a Hub data set is not.
        best: keep only the `best` examples with the highest `score`, in source order. Earlier examples win ties.

    Raises:
        DataError: the data set does not exist, or an example is invalid; the message names file and line.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"{source}: is a folder; give one JSONL file")
    data: JsonLines | _HubTable = JsonLines(path) if path.exists() else _from_hub(source)
    total = len(data)
    rows: Sequence[Row] = LazyRows(
        total if most is None else min(total, most), lambda number: check_row(data.place(number), data.record(number))
    )
    if not rows:
        raise DataError(f"{source}: holds no examples")
    scores = array("d")
    columns: set[str] = set()
    for number in range(total if isinstance(data, JsonLines) else len(rows)):
        place, record = data.place(number), data.record(number)
        check_row(place, record)
        if number < len(rows):
            columns.update(record)
            if best is not None:
                scores.append(_score(place, record))
    if best is not None:
        rows = chosen_rows(rows, sorted(top_k(np.asarray(scores), best).tolist()))
        columns.discard("score")
    return RowSet(source, data.sha256(), rows, total, sorted(columns - USED))


def _score(place: str, record: Mapping[str, Any]) -> float:
    score: Any = record.get("score")
    if not NUMBER.fits(score):
        raise DataError(
            f"{place}: has no score, by which the best examples are chosen; make the file with `safelora-fast select`"
        )
    return float(score)


@dataclass(frozen=True)
class _HubTable:
    """A split of a Hub data set, with the interface of :class:`~safelora_fast.files.jsonl.JsonLines`."""

    name: str
    table: Any

    def __len__(self) -> int:
        return len(self.table)

    def place(self, number: int) -> str:
        return f"{self.name} row {number}"

    def record(self, number: int) -> dict[str, Any]:
        return dict(self.table[number])

    def sha256(self) -> str:
        """Return the digest of the examples as canonical JSON, one per line."""
        digest = hashlib.sha256()
        for number in range(len(self)):
            line = json.dumps(self.record(number), sort_keys=True, default=str)
            digest.update(f"\n{line}".encode() if number else line.encode())
        return digest.hexdigest()


def _from_hub(source: str) -> _HubTable:
    match, hint = HUB_DATA.fullmatch(source), did_you_mean(Path(source).expanduser())
    if match is None or source.endswith((".json", ".jsonl", ".csv", ".txt", ".parquet")):
        raise DataError(f"{source}: there is no such file, and a Hub data set is written id[@revision][:split]{hint}")
    import datasets
    from huggingface_hub import constants, hf_hub_url

    split = match["split"] or "train"
    try:
        reached = is_within_reach(hf_hub_url(match["name"], "README.md", repo_type="dataset"))
        with offline_unless(reached, constants):
            table = datasets.load_dataset(match["name"], revision=match["revision"], split=split)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{source}: neither a file nor a Hub data set that can be loaded: {reason}{hint}") from error
    return _HubTable(f"{match['name']} ({split})", table)


def check_row(place: str, record: Any) -> Row:
    """Check one example. Null columns count as absent, because a table has every column in every row.

    Raises:
        DataError: the example is invalid, for instance without `messages` and without `prompt` and `completion`.
    """
    if not isinstance(record, dict):
        raise DataError(f"{place}: an example must be an object with `messages`, or with `prompt` and `completion`")
    record = {name: value for name, value in record.items() if value is not None}
    if "tools" in record:
        raise DataError(f"{place}: tools are not supported; write them out in a system turn")
    if "messages" in record and not {"prompt", "completion"} & record.keys():
        return Row(place, [], _turns(place, "messages", record["messages"]))
    if "messages" in record or not {"prompt", "completion"} <= record.keys():
        found = ", ".join(sorted(record)) or "nothing"
        raise DataError(
            f"{place}: an example has either `messages`, or `prompt` and `completion`; this one has {found}"
        )
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        _check_text(place, "prompt", prompt)
        _check_text(place, "completion", completion)
        return Row(place, prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        return Row(place, _turns(place, "prompt", prompt), _turns(place, "completion", completion))
    raise DataError(f"{place}: prompt and completion must both be text, or both lists of messages")


def _turns(place: str, column: str, turns: Any) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place}: {column} must be a list of messages, and not empty")
    checked = []
    for number, turn in enumerate(turns, start=1):
        role = turn.get("role") if isinstance(turn, dict) else None
        content = turn.get("content") if isinstance(turn, dict) else None
        if role not in ROLES or not isinstance(content, str):
            raise DataError(
                f"{place}: {column}: message {number} must be {{role: …, content: text}} with a role of {', '.join(ROLES)}"
            )
        if set(turn) - {"role", "content"} and turn.get("tool_calls"):
            raise DataError(f"{place}: {column}: message {number} has tool_calls, which are not supported")
        _check_text(place, f"{column}: message {number}", content)
        checked.append({"role": role, "content": content})
    return checked


def _check_text(place: str, where: str, text: str) -> None:
    """Raise DataError for a lone surrogate: JSON can contain one, but tokenizers and UTF-8 cannot encode it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"{place}: {where} holds {half} by itself, half of a character: fix it") from error


def top_k(scores: ArrayLike, k: int) -> np.ndarray:
    """Return the indices of the k highest scores, highest first; ties go to the lower index. NaN is never selected.

    A partition finds the k-th highest score in one pass, so only about k scores are sorted.

    Returns:
        int64 [at most k].
    """
    keys = -np.asarray(scores, dtype=np.float64)
    k = min(k, int(np.count_nonzero(~np.isnan(keys))))
    if k <= 0:
        return np.empty(0, dtype=np.int64)
    candidates = np.flatnonzero(keys <= np.partition(keys, k - 1)[k - 1])  # a partition puts NaN last
    order: np.ndarray = candidates[np.argsort(keys[candidates], kind="stable")][:k]
    return order
