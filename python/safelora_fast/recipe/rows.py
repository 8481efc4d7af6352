"""Reading the rows of a data set: a local JSONL file, or a data set of the Hub."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from safelora_fast.data.best import top_k
from safelora_fast.errors import DataError
from safelora_fast.json_reading import NUMBER, parse_json
from safelora_fast.posthoc.hub import is_within_reach, offline_unless
from safelora_fast.posthoc.resolver import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Message: TypeAlias = "dict[str, str]"
HUB_DATA = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]+))?")
ROLES = ("system", "developer", "user", "assistant", "tool")
USED = {"messages", "prompt", "completion"}


@dataclass(frozen=True)
class Row:
    """One row, checked.

    Attributes:
        place: where it stands, for messages ("train.jsonl:12").
        prompt: the text before what is learnt, or the turns before it.
        completion: what is learnt, or the turns after the prompt. Of a row of `messages`, these are all turns, and the
            prompt is empty.
    """

    place: str
    prompt: str | list[Message]
    completion: str | list[Message]


@dataclass(frozen=True)
class RowSet:
    """The rows of one data set.

    Attributes:
        source: as the recipe names it.
        sha256: of the file, or of the rows of a Hub data set as canonical JSON.
        rows: in order.
        total: rows in the source, of which `rows` may be the first so many.
        unused: columns that are not used.
    """

    source: str
    sha256: str
    rows: list[Row]
    total: int
    unused: list[str] = field(default_factory=list)


def read_rows(source: str, most: int | None = None, *, best: int | None = None) -> RowSet:
    """Read a data set; a file that exists wins over a Hub data set of the same name.

    Args:
        source: a JSONL file, or a Hub data set id[@revision][:split], by default its split "train".
        most: keep the first so many rows. Every row is checked.
        best: keep only so many, those with the highest `score`, in the order of the source; of equal ones the first.

    Raises:
        DataError: there is no such data set, or a row is not as it must be; file and line are named.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"{source}: is a folder; give one JSONL file")
    if path.exists():
        digest, records = _from_file(path)
    else:
        digest, records = _from_hub(source)
    rows: list[Row] = []
    scores: list[float] = []
    columns: set[str] = set()
    total = 0
    for place, record in records:
        total += 1
        row = check_row(place, record)
        columns.update(record)
        if best is not None:
            scores.append(_score(place, record))
        if most is None or len(rows) < most:
            rows.append(row)
    if not rows:
        raise DataError(f"{source}: holds no rows")
    if best is not None:
        rows = [rows[index] for index in sorted(top_k(scores, best).tolist())]
    return RowSet(source, digest, rows, total, sorted(columns - USED - ({"score"} if best is not None else set())))


def _score(place: str, record: Mapping[str, Any]) -> float:
    score: Any = record.get("score")
    if not NUMBER.fits(score):
        raise DataError(
            f"{place}: has no score, by which the best rows are chosen; make the file with `safelora-fast select`"
        )
    return float(score)


def _from_file(path: Path) -> tuple[str, Iterator[tuple[str, Any]]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the data cannot be read: {error.strerror}") from error
    return hashlib.sha256(content).hexdigest(), _lines(path, content)


def _lines(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            yield place, parse_json(line)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from error


def _from_hub(source: str) -> tuple[str, Iterator[tuple[str, Any]]]:
    match, hint = HUB_DATA.fullmatch(source), did_you_mean(Path(source).expanduser())
    if match is None or source.endswith((".json", ".jsonl", ".csv", ".txt", ".parquet")):
        raise DataError(f"{source}: there is no such file, and a Hub data set is written id[@revision][:split]{hint}")
    import datasets
    from huggingface_hub import constants, hf_hub_url

    split = match["split"] or "train"
    try:
        reached = is_within_reach(hf_hub_url(match["name"], "README.md", repo_type="dataset"))
        with offline_unless(reached, constants, datasets.config):
            table = datasets.load_dataset(match["name"], revision=match["revision"], split=split)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{source}: neither a file nor a Hub data set that can be loaded: {reason}{hint}") from error
    records = [dict(record) for record in table]
    content = "\n".join(json.dumps(record, sort_keys=True, default=str) for record in records)
    return hashlib.sha256(content.encode()).hexdigest(), (
        (f"{match['name']} ({split}) row {number}", record) for number, record in enumerate(records)
    )


def check_row(place: str, record: Any) -> Row:
    """Check one record. A column that is null is not there: tables have every column in every row.

    Raises:
        DataError: it is neither a row of `messages` nor one of `prompt` and `completion`.
    """
    if not isinstance(record, dict):
        raise DataError(f"{place}: a row must be an object with `messages`, or with `prompt` and `completion`")
    record = {name: value for name, value in record.items() if value is not None}
    if "tools" in record:
        raise DataError(f"{place}: tools are not supported; write them out in a system turn")
    if "messages" in record and not {"prompt", "completion"} & record.keys():
        return Row(place, [], _turns(place, "messages", record["messages"]))
    if "messages" in record or not {"prompt", "completion"} <= record.keys():
        found = ", ".join(sorted(record)) or "nothing"
        raise DataError(f"{place}: a row has either `messages`, or `prompt` and `completion`; this one has {found}")
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
    """JSON can write down half of a surrogate pair, which no tokenizer takes and no file of UTF-8 holds."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"{place}: {where} holds {half} by itself, half of a character: mend it") from error
