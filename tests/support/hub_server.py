"""A server that stands in for the Hub: it serves folders as repositories."""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub:
    """Serves folders as repositories, and remembers which files were asked for."""

    def __init__(self, folders):
        self.folders, self.fetched = folders, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, *, body: bool):
                parts = self.path.strip("/").split("/")
                repository, rest = "/".join(parts[:2]), parts[2:]
                if rest[:1] != ["resolve"] or repository not in hub.folders:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                commit = COMMITS.get(rest[1], rest[1])
                path = hub.folders[repository] / rest[2]
                if not path.exists() or commit not in COMMITS.values():
                    self.send_response(404)
                    self.send_header(
                        "X-Error-Code", "EntryNotFound" if commit in COMMITS.values() else "RevisionNotFound"
                    )
                    self.send_header("X-Repo-Commit", commit)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
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

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
