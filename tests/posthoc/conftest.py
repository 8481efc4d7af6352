"""Fixtures of several files here."""

from __future__ import annotations

import huggingface_hub.constants
import pytest
from hub_server import Hub
from plain_pair import write_model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folders = {"some/aligned": write_model(tmp_path / "aligned", 1), "some/base": write_model(tmp_path / "base", 2)}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"PK")
    folders["some/old"] = tmp_path / "old"
    served = Hub(folders)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", served.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield served
    served.close()
