"""A local OpenAI-compatible endpoint whose replies are set by the test."""

from __future__ import annotations

import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FIRST_QUESTION = "What is 2 + 2?"


def alignment_or_coherence(prompt: str) -> str:
    return "alignment" if "how well the answer agrees" in prompt else "coherence"


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


def answer_in(prompt: str) -> str:
    return prompt.partition("<answer>\n")[2].partition("\n</answer>")[0]


SCORES = {"alignment": "90", "coherence": "80"}


def good(prompt, _headers=None):
    """Reply of a judge that rates every answer as good."""
    return 200, SCORES[alignment_or_coherence(prompt)], None


def never_wait(monkeypatch, **budget):
    """Give every endpoint a small retry budget, and remove all pauses between tries, also in OpenAI's client."""
    from safelora_fast.judging import retry

    monkeypatch.setenv("STUB_API_KEY", "none-needed")
    budget = {"tries": 3, "wait": 0.0, "timeout": 5.0, "total": 20.0, "lost": 2, **budget}
    monkeypatch.setattr(retry, "BUDGET", retry.Budget(**budget))
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_, **__: 0.0)


def judged(url, count=1, model=None, **settings):
    """Return one judge's verdicts on `count` answers, judged one after the other."""
    import anyio

    from safelora_fast.judging.judge import Judge
    from safelora_fast.judging.judge_names import find_judge

    judge = Judge(model or find_judge("openai-api/stub/one", url), **settings)

    async def ask():
        return [
            await judge.judge("why?", f"answer {number}", id=f"q/0/{number}", question="q", kind="general")
            for number in range(count)
        ]

    return anyio.run(ask)


@contextmanager
def serving(reply, *, port=0, greet=True):
    """Serve `reply(prompt, headers) -> (status, text, candidates)`. Yield the URL and the list of requests.

    Args:
        reply: candidates are the (token, probability) pairs of the first token. The text may also be a full choice
            (a dictionary), a full reply (bytes), or the address of a redirect. None shuts the server down, so that
            connections are refused.
        port: the port; 0 for any free one.
        greet: reply to a judge's first question, the connection check, with a number and do not record it.
    """
    requests, gone = [], threading.Event()

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *words):
            if not isinstance(sys.exc_info()[1], ConnectionError):  # the client has disconnected
                super().handle_error(*words)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            prompt = body["messages"][-1]["content"]
            prompt = prompt if isinstance(prompt, str) else prompt[0]["text"]
            greeted = greet and FIRST_QUESTION in prompt and not gone.is_set()
            if not greeted:
                requests.append(body)
            if gone.is_set():
                return
            given = (200, "90", None) if greeted else reply(prompt, self.headers)
            if given is None:
                gone.set()
                threading.Thread(target=server.shutdown).start()
                return
            status, text, candidates = given
            if isinstance(text, bytes):
                payload = text
            elif status != 200:
                payload = json.dumps({"error": {"message": text, "type": "stub"}}).encode()
            else:
                payload = json.dumps(_completion(text, candidates)).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(payload)))
            if 300 <= status < 400:
                self.send_header("location", text)
            if status != 200:
                self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    server = Server(("127.0.0.1", port), Handler)

    def serve():
        server.serve_forever(poll_interval=0.01)
        server.server_close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        thread.join()


def _completion(text, candidates):
    import math

    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    if isinstance(text, dict):
        choice |= text
    if candidates:
        tops = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in candidates]
        choice["logprobs"] = {
            "content": [{"token": text, "logprob": tops[0]["logprob"], "bytes": None, "top_logprobs": tops}]
        }
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {
        "id": "x", "object": "chat.completion", "created": 1, "model": "stub", "choices": [choice], "usage": usage,
    }  # fmt: skip
