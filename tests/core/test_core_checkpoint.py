from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
from dense import start
from safetensors.numpy import load_file, save_file

from safelora_fast import _core
from safelora_fast.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_of_the_safetensors_library_is_read_as_it_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {
        "weight": rng.standard_normal((3, 5)).astype(np.float32),
        "half": rng.standard_normal((2, 2, 2)).astype(np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(7, np.int64),
        "bytes": np.arange(5, dtype=np.uint8),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "ä\n"})
    file = _core.SafetensorsFile(str(path))
    assert file.metadata == {"format": "pt", "note": "ä\n"}
    assert (file.path, file.size) == (str(path), path.stat().st_size)
    names = {"float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8"}
    content = path.read_bytes()
    assert file.data_start == 8 + struct.unpack("<Q", content[:8])[0]
    loaded = load_file(path)
    assert set(file.tensors) == set(loaded)
    for name, (dtype, shape, begin, end) in file.tensors.items():
        assert (dtype, shape) == (names[loaded[name].dtype.name], loaded[name].shape)
        assert content[begin:end] == file.read(name) == loaded[name].tobytes()
    assert "model.safetensors" in repr(file)
    with pytest.raises(CheckpointError, match='no tensor "other" in this file'):
        file.read("other")


def test_a_view_keeps_its_file_open(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((2, 3), np.float32)}, path)
    view = _core.View(_core.SafetensorsFile(str(path)), "a", rows=2, cols=3, row_stride=3)
    path.unlink()
    part = _core.Part(view, view)
    (outcome,) = start([_core.Job("m", [part], [])])
    assert outcome.v_norm == 0
    assert "2x3" in repr(view)
    assert "2x3" in repr(part)


def test_views_are_copied_to_memory(tmp_path: Path) -> None:
    whole = np.random.default_rng(2).standard_normal((300, 70)).astype(np.float32)
    path = tmp_path / "model.safetensors"
    save_file({"a": whole}, path)
    file = _core.SafetensorsFile(str(path))
    views = [
        _core.View(file, "a", offset=70 * row, rows=rows, cols=70, row_stride=70) for row, rows in ((0, 300), (7, 2))
    ]
    targets = [np.full((rows, 70), np.nan, np.float32) for rows in (300, 2)]
    places = [(target.ctypes.data, target.nbytes) for target in targets]
    _core.copy_views(views, places, threads=3)
    assert np.array_equal(targets[0], whole)
    assert np.array_equal(targets[1], whole[7:9])
    with pytest.raises(ValueError, match="2 views but 1 targets"):
        _core.copy_views(views, places[:1])
    with pytest.raises(ValueError, match=r'a target of 4 bytes at .* for tensor "a", whose view has 560'):
        _core.copy_views(views, [places[0], (places[1][0], 4)])
    with pytest.raises(ValueError, match="two targets share memory"):
        _core.copy_views(views, [places[0], (places[0][0] + 560, 560)])


def test_an_index_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    for shard in shards.values():
        (tmp_path / shard).touch()
    (tmp_path / "index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    expected = {name: str(tmp_path / shard) for name, shard in shards.items()}
    assert _core.read_index(str(tmp_path / "index.json")) == expected
    monkeypatch.chdir(tmp_path)
    assert _core.read_index("index.json") == expected


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match="leaves the folder"):
        _core.read_index(str(path))
