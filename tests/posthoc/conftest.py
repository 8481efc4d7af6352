"""Fixtures of several files here."""

from __future__ import annotations

import pytest
from hub_server import serve
from plain_pair import write_model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folders = {"some/aligned": write_model(tmp_path / "aligned", 1), "some/base": write_model(tmp_path / "base", 2)}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"PK")
    folders["some/old"] = tmp_path / "old"
    with serve(folders, tmp_path / "cache", monkeypatch) as served:
        yield served
