"""Records that several processes write and read at once, and what becomes of damaged ones."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from safelora_fast.errors import OutputError
from safelora_fast.files.tensor_records import SUFFIX, RawTensor, TensorRecords

KEYS = [bytes([number]) * 16 for number in range(6)]
# A second process: writes every key again, and reads whatever is there after each.
OTHER = """
import sys
from pathlib import Path
from test_tensor_records import KEYS, TensorRecords, check, raw
records = TensorRecords(Path(sys.argv[1]))
for turn in range(20):
    for key in KEYS:
        records.append(key, {-1: raw(key, -1), 3: raw(key, 3)})
        records.refresh()
        for one in KEYS:
            found = records.read(one, {-1, 3})
            check(one, found)
            assert len(found) == 2 or (turn == 0 and not found)
"""


def raw(key, number):
    """A matrix that says whose it is."""
    values = np.full((3 + key[0], 5), 100 * key[0] + number, np.float32)
    return RawTensor("float32", values.shape, memoryview(values).cast("B"))


def check(key, found):
    for number, one in found.items():
        assert (one.dtype, one.shape) == ("float32", (3 + key[0], 5))
        assert (np.frombuffer(one.data, np.float32) == 100 * key[0] + number).all()


def written(folder, keys=KEYS):
    records = TensorRecords(folder)
    for key in keys:
        records.append(key, {-1: raw(key, -1), 3: raw(key, 3)})
    return records


def only_file(folder):
    (path,) = folder.glob(f"*{SUFFIX}")
    return path


def test_what_another_has_written_is_found(tmp_path):
    one, two = TensorRecords(tmp_path), written(tmp_path, KEYS[:2])
    assert one.read(KEYS[0], {3}) == {}
    one.refresh()
    for records in (one, two, TensorRecords(tmp_path)):
        for key in KEYS[:2]:
            found = records.read(key, {-1, 3, 7})
            assert found.keys() == {-1, 3}
            check(key, found)
        assert records.read(KEYS[1], {3}).keys() == {3}
        assert records.read(KEYS[2], {3}) == {}
    assert two.is_own(KEYS[0])
    assert not one.is_own(KEYS[0])
    one.append(KEYS[0], {7: raw(KEYS[0], 7)})
    check(KEYS[0], one.read(KEYS[0], {-1, 3, 7}))
    assert one.read(KEYS[0], {-1, 3, 7}).keys() == {-1, 3, 7}


def test_processes_write_and_read_at_once(tmp_path):
    """Processes of their own, because a file that is being written shows any part of its last record."""
    command = [sys.executable, "-c", OTHER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    running = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(timeout=60) for process in running] == [0, 0]
    for key in KEYS:
        check(key, TensorRecords(tmp_path).read(key, {-1, 3}))


def test_a_truncated_file_ends_with_its_last_whole_record(tmp_path):
    records, ends = TensorRecords(tmp_path), []
    for key in KEYS:
        records.append(key, {-1: raw(key, -1), 3: raw(key, 3)})
        ends.append(only_file(tmp_path).stat().st_size)
    for size in reversed(range(0, ends[-1], 7)):
        os.truncate(only_file(tmp_path), size)
        records = TensorRecords(tmp_path)
        for key, end in zip(KEYS, ends, strict=True):
            found = records.read(key, {-1, 3})
            check(key, found)
            assert len(found) == (2 if end <= size else 0)


def test_any_flipped_byte_is_noticed(tmp_path):
    """Every byte of a file of two records; a damaged tensor leaves the others of its record."""
    written(tmp_path, KEYS[:2])
    path = only_file(tmp_path)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        records = TensorRecords(tmp_path)
        found = [records.read(key, {-1, 3}) for key in KEYS[:2]]
        assert 0 <= sum(map(len, found)) < 4
        for key, tensors in zip(KEYS, found, strict=False):
            check(key, tensors)


def test_a_file_that_is_damaged_while_it_is_open(tmp_path, caplog):
    records = written(tmp_path)
    other = TensorRecords(tmp_path)
    path = only_file(tmp_path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert [records.read(key, {-1, 3}) for key in KEYS] == [other.read(key, {-1, 3}) for key in KEYS] == [{}] * 6
    os.truncate(path, 10)
    assert records.read(KEYS[0], {3}) == other.read(KEYS[0], {3}) == {}
    assert len(caplog.records) == 2  # once for each reader


def test_a_full_disk_leaves_whole_records(tmp_path, monkeypatch):
    records, write, room = written(tmp_path, KEYS[:2]), os.write, 70

    def until_full(descriptor, data):
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(descriptor, data[:room])
        room -= count
        return count

    size = only_file(tmp_path).stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", until_full)
        with pytest.raises(OutputError, match="the disk is full"):
            records.append(KEYS[2], {3: raw(KEYS[2], 3)})
    assert only_file(tmp_path).stat().st_size == size
    records.append(KEYS[3], {3: raw(KEYS[3], 3)})
    for reader in (records, TensorRecords(tmp_path)):
        assert reader.read(KEYS[2], {3}) == {}
        check(KEYS[3], reader.read(KEYS[3], {3}))
        assert reader.read(KEYS[3], {3})


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/records"):
        TensorRecords(tmp_path / "file" / "records")


def test_what_cannot_be_opened_counts_as_absent(tmp_path, caplog):
    """A file that vanishes or belongs to somebody else, with one warning; a folder or a pipe of that name, without waiting."""
    written(tmp_path, KEYS[:1])
    (tmp_path / f"gone{SUFFIX}").symlink_to(tmp_path / "nothing")
    (tmp_path / f"folder{SUFFIX}").mkdir()
    os.mkfifo(tmp_path / f"pipe{SUFFIX}")
    records = TensorRecords(tmp_path)
    records.refresh()
    check(KEYS[0], records.read(KEYS[0], {3}))
    assert records.read(KEYS[0], {3})
    (warning,) = caplog.records
    assert f"gone{SUFFIX}: cannot be opened (No such file or directory)" in warning.message
