"""Folders in remote stores, by URL (`s3://`, `gs://`, `hf://`), through fsspec, which comes with huggingface_hub.

A store has no step that gives a folder its name. So a folder is uploaded with its marker last, and a marker without
content first, which tells a half-written folder from one of somebody else.

All functions raise StoreError if the store fails, PermissionError if it refuses, MissingDependencyError if the package for
its protocol is missing, and SettingsError if the protocol is unknown.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING, Any

from safelora_fast.errors import MissingDependencyError, SettingsError, StoreError
from safelora_fast.files.json_reader import MOST_BYTES, parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)://.+", re.DOTALL)
CONTENT_KEYS = ("ETag", "md5Hash", "blob_id")  # what S3, Google, and the Hub call the identity of a file's content


def is_url(place: object) -> bool:
    """Return whether a place is a URL like `s3://bucket/folder`."""
    return isinstance(place, str) and URL.fullmatch(place) is not None


def joined(url: str, name: str) -> str:
    """Return the URL of a file or folder below a folder."""
    return f"{url.rstrip('/')}/{name}"


def find(url: str, name: str) -> list[str]:
    """Return the relative paths of all folders below `url` that hold a file of this name, sorted."""
    with _opened(url) as (store, path):
        top = path.strip("/")
        files = [file.strip("/") for file in store.find(path)]
    return sorted(file[len(top) + 1 : -len(name) - 1] for file in files if file.endswith(f"/{name}"))


def names(url: str) -> list[str]:
    """Return the names in a folder, sorted; none if it does not exist."""
    with _opened(url) as (store, path):
        try:
            entries = store.ls(path, detail=False)
        except FileNotFoundError:
            return []
    return sorted(entry.rstrip("/").rpartition("/")[2] for entry in entries if entry.strip("/") != path.strip("/"))


def read(url: str) -> bytes | None:
    """Return the content of a small file; None if there is none."""
    with _opened(url) as (store, path):
        try:
            if store.size(path) > MOST_BYTES:
                raise StoreError(f"{url}: holds more than {MOST_BYTES:,} bytes, the most that are read")
            content: bytes = store.cat_file(path)
        except FileNotFoundError:
            return None
        return content


def read_document(url: str) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if there is no file, and no content if it is damaged."""
    content = read(url)
    if content is None:
        return None
    try:
        value = parse_json(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def write(url: str, content: bytes) -> None:
    """Write or replace a small file."""
    with _opened(url) as (store, path):
        store.pipe_file(path, content)


def remove(url: str) -> None:
    """Delete a file if it exists."""
    with _opened(url) as (store, path), contextlib.suppress(FileNotFoundError):
        store.rm_file(path)


def content_stamp(url: str, files: Sequence[str]) -> str | None:
    """Return what a store says about the content of files in a folder, without reading them; None if it does not.

    Raises:
        FileNotFoundError: a file is missing.
    """
    found = []
    for name in files:
        with _opened(joined(url, name)) as (store, path):
            facts = store.info(path)
        content = next((facts[key] for key in CONTENT_KEYS if facts.get(key)), None)
        if content is None:
            return None
        found.append(f"{name} {facts['size']} {content}")
    return ", ".join(found)


def fetch(url: str, files: Sequence[str], folder: Path) -> None:
    """Copy files of a remote folder into a new local folder.

    Raises:
        FileNotFoundError: a file is missing.
    """
    folder.mkdir(parents=True)
    for name in files:
        with _opened(joined(url, name)) as (store, path):
            store.get_file(path, str(folder / name))


def upload(folder: Path, url: str, marker: str, document: Mapping[str, Any]) -> None:
    """Upload the files of a folder. Its marker is written last, with the document; until then it has no content."""
    write(joined(url, marker), json.dumps({}).encode())
    for file in sorted(folder.iterdir()):
        if file.name != marker:
            with _opened(joined(url, file.name)) as (store, path):
                store.put_file(str(file), path)
    write(joined(url, marker), (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode(errors="replace"))


@contextlib.contextmanager
def _opened(url: str) -> Iterator[tuple[Any, str]]:
    """Yield the file system and the path in it. Errors become one line, but for a missing or forbidden file."""
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    try:
        store, path = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:  # the message names the package
        raise MissingDependencyError(f"{protocol}://: {error}") from error
    except ValueError as error:
        raise SettingsError(f"{url}: {error}") from error
    try:
        store.invalidate_cache()
        yield store, path
    except (FileNotFoundError, PermissionError, StoreError):
        raise
    except Exception as error:  # each store has its own: of the network, of credentials, of permissions
        lines = str(error).splitlines() or [type(error).__name__]
        raise StoreError(
            f"{url}: the store failed: {lines[0]}; check the network, the credentials and the URL"
        ) from error
