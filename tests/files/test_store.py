"""Files that survive a kill: JSON as a whole, JSONL line by line, and the message for changed settings."""

from __future__ import annotations

import errno
import json
import os

import pytest

from safelora_fast.errors import DataError, OutputError
from safelora_fast.files.json_reader import COUNT, check_fields
from safelora_fast.files.store import JsonlStore, changed_settings, plain, settings_message, write_json

ROWS = [{"row": number, "text": "né\n" * number} for number in range(4)]


def check(row):
    return check_fields(row, {"row": COUNT})


@pytest.fixture
def store(tmp_path):
    made = JsonlStore(tmp_path / "new" / "rows.jsonl", "row of a test")
    made.append(ROWS[:1])
    made.append(ROWS[1:])
    return made


def test_rows_come_back(store):
    assert store.read(check) == ROWS
    assert len(store.path.read_text().splitlines()) == len(ROWS)
    store.remove()
    store.remove()
    assert store.read(check) == []


def test_a_store_killed_anywhere_goes_on(store):
    whole = store.path.read_bytes()
    for cut in range(len(whole)):
        store.path.write_bytes(whole[:cut])
        done = store.read(check)
        assert done == ROWS[: whole[:cut].count(b"\n")]
        assert store.path.read_bytes() == whole[:cut], "reading changes nothing"
        store.append(ROWS[len(done) :])
        assert store.path.read_bytes() == whole, f"killed after {cut} bytes"


@pytest.mark.parametrize("content", ["notes", "notes\n", "{}", "[]\n", '{"row": -1}\n', "\udcff\n", "{\n"])
def test_other_files_are_refused(store, content):
    rows = store.path.read_bytes()
    store.path.write_bytes(rows + content.encode(errors="surrogateescape"))
    if content == "{}":  # this may be half a row
        assert store.read(check) == ROWS
        return
    with pytest.raises(
        DataError, match=rf"rows.jsonl:{1 + len(ROWS)}: is not a valid row of a test \(.*delete the file"
    ):
        store.read(check)


def test_every_write_is_on_the_disk_when_it_returns(tmp_path, monkeypatch):
    synced = []
    sync = os.fsync
    monkeypatch.setattr("os.fsync", lambda descriptor: [synced.append(os.fstat(descriptor).st_ino), sync(descriptor)])
    path = tmp_path / "rows.jsonl"
    JsonlStore(path, "row").append(ROWS)
    assert {path.stat().st_ino, tmp_path.stat().st_ino} == set(synced)
    synced.clear()
    write_json(tmp_path / "settings.json", {})
    assert {(tmp_path / "settings.json").stat().st_ino, tmp_path.stat().st_ino} == set(synced)


def test_json_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "settings.json"
    write_json(path, {"é": [float("nan"), (1, float("inf"))], "path": tmp_path})
    assert json.loads(path.read_text()) == {"é": [None, [1, None]], "path": str(tmp_path)}
    before = path.read_bytes()
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_places_that_cannot_be_written_or_read(tmp_path):
    (tmp_path / "file").touch()
    for write in (lambda path: write_json(path, {}), lambda path: JsonlStore(path, "row").append(ROWS)):
        with pytest.raises(OutputError, match="cannot be written"):
            write(tmp_path / "file" / "inside")
    with pytest.raises(DataError, match=f"{tmp_path}: cannot be read: Is a directory"):
        JsonlStore(tmp_path, "row").read(check)


@pytest.mark.parametrize(
    ("former", "now", "words"),
    [
        ({"seed": 0}, {"seed": 0, "top_p": None}, None),
        ({"seed": 0, "model": {"path": "a", "dtype": "x"}}, {"model": {"path": "b", "dtype": "x"}},
         "out: settings have changed: model.path was 'a', is 'b'; seed was 0, is None; change them back"),
        ({"ends": (1, 2), "data": {}}, {"ends": [1, 2], "data": {}}, None),
        (dict.fromkeys("abcdef", 0), {}, "c was 0, is None; d was 0, is None and 2 more; change them back"),
        ({"format": 1, "seed": 0}, {"format": 2, "seed": 1},
         "out: was written by another version of safelora-fast (format 1, now 2); change them back"),
    ],
)  # fmt: skip
def test_settings_that_have_changed(former, now, words):
    message = settings_message("out", changed_settings(plain(former), plain(now)), "change them back")
    assert message == words or (words and message.endswith(words))


def test_a_long_value_is_shortened():
    assert len(settings_message("out", changed_settings({"a": "x" * 1000}, {"a": "y" * 1000}), "")) < 260


def test_a_full_disk_says_what_is_left(store, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OutputError, match=r"the disk is full \(.*\); what is stored stays: make room, and run the same command"
    ):
        store.append(ROWS[:1])
    assert store.read(check)[: len(ROWS)] == ROWS
    with pytest.raises(OutputError, match=r"the disk is full \(.*\); nothing of it is left"):
        write_json(tmp_path / "x.json", {})
    assert not list(tmp_path.glob("*x.json*"))
