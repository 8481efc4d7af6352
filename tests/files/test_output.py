"""Output folders are complete or absent, and never replace anything without permission."""

from __future__ import annotations

import ctypes
import errno
from pathlib import Path

import pytest

from safelora_fast.errors import OutputError
from safelora_fast.files.output import abandoned, check_file, check_target, whole_file, whole_folder


def write(target, *, meanwhile=lambda: None, **options):
    with whole_folder(target, **options) as partial:
        (partial / "new").write_text("new")
        meanwhile()


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out"

    def other_run():
        target.mkdir()
        (target / "thesis.txt").write_text("thesis")

    with pytest.raises(OutputError, match=r"out: appeared while this ran.*--overwrite"):
        write(target, meanwhile=other_run)
    assert names(tmp_path) == ["out", "thesis.txt"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert names(tmp_path) == ["new", "out"]


class WithoutExchange:
    """A system whose C library has no renameat2."""


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: WithoutExchange())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    write(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["new", "out"]


def test_a_rename_that_fails_leaves_what_stood_there(tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: WithoutExchange())
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    rename = type(target).rename

    def refuse(path, to):
        if "partial" in path.name and to == target and target.with_name("refused").exists():
            raise OSError(errno.EIO, "refused")
        if path == target:
            target.with_name("refused").touch()
        return rename(path, to)

    monkeypatch.setattr(type(target), "rename", refuse)
    with pytest.raises(OutputError, match="refused"):
        write(target, overwrite=True)
    assert names(tmp_path) == ["old", "out", "refused"]


def test_the_current_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in (".", "", str(tmp_path)):
        with pytest.raises(OutputError, match="is the current folder"):
            check_target(type(tmp_path)(word), [], overwrite=True, nbytes=0)


def test_what_a_run_is_writing_is_not_taken_for_abandoned(tmp_path):
    target = tmp_path / "out"
    left = tmp_path / ".out.partial-killed00"
    left.mkdir()
    (tmp_path / ".outer.partial-other").mkdir()
    with whole_folder(target):
        assert abandoned(target) == [left]
    with whole_file(tmp_path / "file"):
        assert abandoned(tmp_path / "file") == []
    (tmp_path / ".file.partial-killed00").touch()
    assert abandoned(tmp_path / "file") == [tmp_path / ".file.partial-killed00"]
    assert abandoned(tmp_path / "nowhere" / "out") == []


def test_a_relative_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".out.partial-killed00").mkdir()
    assert abandoned(type(tmp_path)("out")) == [tmp_path / ".out.partial-killed00"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Without locks, nothing is reported as abandoned, and runs still work."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".out.partial-killed00").mkdir()
    write(tmp_path / "out")
    assert abandoned(tmp_path / "out") == []
    assert (tmp_path / "out" / "new").exists()


def test_a_url_does_not_become_folders(tmp_path, monkeypatch):
    """Path turns `s3://bucket/a` into the relative path `s3:/bucket/a`."""
    monkeypatch.chdir(tmp_path)
    for url in ("s3://bucket/a", "hf://x", "file:///tmp/x"):
        with pytest.raises(OutputError, match="is a URL, but this is written to a disk: give a path"):
            check_target(Path(url), [], overwrite=False, nbytes=0)
        with pytest.raises(OutputError, match="is a URL"):
            check_file(Path(url), [], overwrite=False)
    check_target(tmp_path / "s3:" / "a", [], overwrite=False, nbytes=0)
    check_target(Path("a:b"), [], overwrite=False, nbytes=0)
