"""A small server that speaks `POST /v1/score`, for tests of whom it is asked by."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]


def scores_of(dialogues: list[dict[str, Any]]) -> Answer:
    """What `llama2-chat serve` answers, with the answer's length as helpfulness and half of it as safety."""
    lengths = [len(dialogue["messages"][-1]["content"]) for dialogue in dialogues]
    scores = [{"helpfulness": -n / 10, "safety": n / 20, "branch": "helpfulness"} for n in lengths]
    return 200, {}, json.dumps({"model": "m", "scores": scores}).encode()


class Server:
    """A server on this machine; `answer` may be replaced, `requests` holds what came."""

    def __init__(self) -> None:
        self.answer: Callable[[list[dict[str, Any]]], Answer] = scores_of
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.most_at_once = self._now = 0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append((self.path, dict(self.headers), body))
                    outer._now += 1
                    outer.most_at_once = max(outer.most_at_once, outer._now)
                code, headers, content = outer.answer(body["dialogues"])
                with lock:
                    outer._now -= 1
                try:
                    self.send_response(code)
                    for name, value in ({"Content-Length": str(len(content))} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    pass  # the client has gone

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
