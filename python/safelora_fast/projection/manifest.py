"""The adapters of a fleet and the folders of their outputs: from rows, a JSONL list, or the folders below a parent.

Everything that can be wrong with the list itself is found here, before the first adapter is read: names that leave
their folder, and outputs that would contain one another, an input, or the list of failures.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safelora_fast.checkpoints.resolver import ADAPTER_CONFIG
from safelora_fast.errors import DataError, OutputError, SettingsError
from safelora_fast.files.json_reader import TEXT, check_fields, parse_json
from safelora_fast.files.jsonl import JsonLines
from safelora_fast.files.output import resolved
from safelora_fast.files.remote import find, is_url, joined, read

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LOCAL_URL = re.compile(r"(file|local)://")
FAILURES = re.compile(r"failed(-\d+-of-\d+)?\.jsonl")
REQUIRED, OPTIONAL = {"id": TEXT, "adapter": TEXT}, {"output": TEXT, "revision": TEXT}
FORM = '{"id": "team/run", "adapter": "PATH|HUB_ID|URL", "output": "optional", "revision": "optional"}'


@dataclass(frozen=True)
class Row:
    """One adapter: its id, where it is (a path, a Hub id with an optional `@revision`, or a URL), and its output."""

    id: str
    adapter: str
    output: str


def read_manifest(
    source: str | Path | Iterable[Mapping[str, Any]], output: str | Path, models: Sequence[Path] = ()
) -> list[Row]:
    """Return the adapters of a fleet.

    Args:
        source: a JSONL file with an object `{"id", "adapter", "output"?, "revision"?}` per line, a folder with adapters
            somewhere below it (either may be a URL), or rows.
        output: the folder or URL below which outputs lie.
        models: local checkpoints, which no output may touch.

    Raises:
        DataError: a row is invalid; the message names the line.
        OutputError: an output would contain, or lie in, another output, an adapter, a model, or the source.
    """
    if not isinstance(source, str | Path):
        if not isinstance(source, Iterable):
            raise SettingsError(f"the fleet must be a JSONL file, a folder of adapters, or rows, not {source!r}")
        rows = [_row(value, f"row {number}", output) for number, value in enumerate(source, start=1)]
        return _apart(rows, models)
    if is_url(source):
        return _apart(_remote(str(source), output), models)
    path = Path(source).expanduser()
    if path.is_dir():
        return _apart(_below(path, output), [*models, path])
    lines = JsonLines(path, "list of adapters")
    return _apart([_row(lines.record(i), lines.place(i), output) for i in range(len(lines))], [*models, path])


def _remote(url: str, output: str | Path) -> list[Row]:
    """Return the rows of a remote list, whose name ends in .jsonl, or the adapters below a remote folder."""
    if url.endswith(".jsonl"):
        content = read(url)
        if content is None:
            raise DataError(f"{url}: there is no such list")
        rows = []
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                try:
                    rows.append(_row(parse_json(line), f"{url}:{number}", output))
                except ValueError as error:
                    raise DataError(f"{url}:{number}: {error}") from error
        return rows
    names = {name for name in find(url, ADAPTER_CONFIG) if not any(part.startswith(".") for part in name.split("/"))}
    outermost = sorted(name for name in names if not any(str(one) in names for one in PurePosixPath(name).parents))
    if not outermost or "" in names:
        raise DataError(f"{url}: is no folder with adapters below it, each with {ADAPTER_CONFIG}")
    return [_row({"id": name, "adapter": joined(url, name)}, url, output) for name in outermost]


def _row(value: Any, place: str, output: str | Path) -> Row:
    try:
        fields = check_fields(value, REQUIRED, OPTIONAL)
        if unknown := sorted(fields.keys() - REQUIRED.keys() - OPTIONAL.keys()):
            raise ValueError(f"unknown key {unknown[0]!r}; a row is {FORM}")
        if empty := next((key for key, text in fields.items() if text is not None and not text.strip("\0 ")), None):
            raise ValueError(f"{empty} is empty")
        for key, text in fields.items():
            if text is not None and not _encodable(text):
                raise ValueError(f"{key} {text!r} holds a character that no path can have")
        name = _relative(fields["id"], "id")
        adapter, revision = fields["adapter"], fields.get("revision")
        if revision is not None:
            if is_url(adapter) or Path(adapter).expanduser().exists():
                raise ValueError(f"revision belongs to a Hub id, and {adapter} is a path or a URL")
            adapter = f"{adapter}@{revision}"
        own = fields.get("output")
        if here := next((text for text in (adapter, own) if text and LOCAL_URL.match(text)), None):
            raise ValueError(f"{here} is on this machine: give its path")
        if own is not None and not is_url(own) and not Path(own).is_absolute():
            own = _joined(output, _relative(own, "output"))
    except (ValueError, OSError) as error:
        raise DataError(f"{place}: {error}") from error
    return Row(name, adapter, own or _joined(output, name))


def _encodable(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _relative(name: str, key: str) -> str:
    """Return a relative path that stays in its folder."""
    parts = name.split("/")
    if any(part.strip() in {"", ".", ".."} or part.startswith(".") or "\0" in part or "\\" in part for part in parts):
        raise ValueError(
            f"{key} {name!r} is not a relative path like team/run, without '..' and parts that start with a dot"
        )
    if FAILURES.fullmatch(parts[0]):
        raise ValueError(f"{key} {name!r} is the name of the list of failures; choose another")
    return name


def _joined(output: str | Path, name: str) -> str:
    return joined(str(output), name) if is_url(output) else str(Path(output, name))


def _below(folder: Path, output: str | Path) -> list[Row]:
    """Return the adapters below a folder, sorted. Folders in an adapter (checkpoints of its training) do not count."""
    if (folder / ADAPTER_CONFIG).exists():
        raise DataError(f"{folder}: is an adapter itself; give the folder that holds it, or project it alone")
    found = sorted(_walk(folder, set()))
    if not found:
        raise DataError(f"{folder}: no folder below it holds {ADAPTER_CONFIG}")
    names = [str(path.relative_to(folder)) for path in found]
    return [
        _row({"id": name, "adapter": str(path)}, str(path), output) for name, path in zip(names, found, strict=True)
    ]


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield the outermost folders that hold an adapter. Links are followed once; names with a dot in front are not."""
    if (place := resolved(folder)) in seen:
        return
    seen.add(place)
    try:
        entries = [Path(entry) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    for entry in entries:
        if (entry / ADAPTER_CONFIG).exists():
            yield entry
        else:
            yield from _walk(entry, seen)


def _apart(rows: list[Row], inputs: Sequence[Path]) -> list[Row]:
    """Check that ids differ, and that no output contains another output or an input, or lies in one."""
    if not rows:
        raise DataError("the list names no adapter")
    if twice := next((name for name, count in Counter(row.id for row in rows).items() if count > 1), None):
        raise DataError(f"the id {twice!r} occurs twice; give each adapter an id of its own")
    outputs: dict[PurePosixPath, Row] = {}
    for row in rows:
        if (other := outputs.setdefault(_place(row.output), row)) is not row:
            raise OutputError(f"{row.output}: is the output of {other.id!r} and of {row.id!r}")
    read = {_place(row.adapter): f"the adapter of {row.id!r}" for row in rows}
    read |= {_place(str(path)): str(path) for path in inputs}
    for place, row in outputs.items():
        if parent := next((outer for outer in place.parents if outer in outputs), None):
            raise OutputError(f"{row.output}: lies in the output of {outputs[parent].id!r}; outputs must not nest")
        if parent := next((outer for outer in (place, *place.parents) if outer in read), None):
            raise OutputError(f"{row.output}: is, or lies in, {read[parent]}, which is read")
    for place, what in read.items():
        if parent := next((outer for outer in place.parents if outer in outputs), None):
            raise OutputError(f"{outputs[parent].output}: contains {what}, which is read")
    return rows


def _place(place: str) -> PurePosixPath:
    """Return a path without links, or a URL, for comparisons. A Hub id becomes a path that does not exist."""
    return PurePosixPath(place) if is_url(place) else PurePosixPath(resolved(Path(place).expanduser()))
