"""A stub server of the Hugging Face Hub, and an address without any server."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub:
    """Serves folders as repositories, and records which files were requested."""

    def __init__(self, folders):
        self.folders, self.fetched = folders, []
        self.refusal = None  # if set, the status and error code of every reply
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, *, body: bool):
                parts = self.path.strip("/").split("/")
                repository, rest = "/".join(parts[:2]), parts[2:]
                if hub.refusal is not None:
                    self.refuse(*hub.refusal)
                    return
                if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in hub.folders:
                    self.list_files("/".join(parts[2:4]), parts[4:])
                    return
                if rest[:1] != ["resolve"] or repository not in hub.folders:
                    self.refuse(404, "RepoNotFound")
                    return
                commit = COMMITS.get(rest[1], rest[1])
                path = hub.folders[repository] / rest[2]
                if not path.exists() or commit not in COMMITS.values():
                    code = "EntryNotFound" if commit in COMMITS.values() else "RevisionNotFound"
                    self.refuse(404, code, commit)
                    return
                content = path.read_bytes()
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", commit)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    hub.fetched.append((repository, commit, rest[2]))
                    self.wfile.write(content)

            def list_files(self, repository: str, rest: list[str]):
                """Reply with `tree/REVISION[/FOLDER]`, or with information about the repository."""
                files = [
                    {"type": "file", "path": file.name, "oid": "0" * 40, "size": file.stat().st_size}
                    for file in sorted(hub.folders[repository].iterdir())
                ]
                if rest[2:]:
                    self.refuse(404, "EntryNotFound")
                    return
                commit = COMMITS.get(rest[1], rest[1]) if rest[1:] else COMMITS["main"]
                known = {"id": repository, "sha": commit, "siblings": [{"rfilename": file["path"]} for file in files]}
                content = json.dumps(files if rest[:1] == ["tree"] else known).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def refuse(self, status: int, code: str, commit: str | None = None):
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                if commit is not None:
                    self.send_header("X-Repo-Commit", commit)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def serve(folders, cache, monkeypatch):
    """Serve folders to this process by their Hub ids."""
    served = Hub(folders)
    point_at(served.address, cache, monkeypatch)
    return served


def point_at(address, cache, monkeypatch):
    """Make this process use `address` as the Hub."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    transformers_hub = sys.modules.get("transformers.utils.hub")
    if transformers_hub is not None:  # newer versions have a separate HfApi
        monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """Use an address without a server as the Hub. Return the list of pauses between retries."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    point_at(address, tmp_path / "cache", monkeypatch)
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    return pauses
