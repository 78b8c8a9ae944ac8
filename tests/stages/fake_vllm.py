"""Stands in for vLLM's server in tests: its command line, its socket, its answers, and no model.

Copied into an environment of its own as `vllm.entrypoints.launchers.api_server.entry`, so the standard library alone.
The environment variable FAKE_VLLM names what goes wrong; what was asked is appended to the file FAKE_VLLM_REQUESTS.
"""

from __future__ import annotations

import json
import os
import signal
import socketserver
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler

FAULT = os.environ.get("FAKE_VLLM", "")
STOP = 2


def sample(request: dict, index: int) -> dict:
    """Tokens counted up from the sample's seed; every third sample stops after four tokens."""
    asked = request["sampling_params"]
    seed = asked["seed"] + index
    stops = seed % 3 == 0 and asked["max_tokens"] > 4
    count = 4 if stops else asked["max_tokens"]
    ids = [3 + (seed + place) % 40 for place in range(count)]
    if stops:
        ids[-1] = STOP
    return {
        "index": index,
        "finish_reason": "stop" if stops else "length",
        "token_ids": ids,
        "logprobs": {"content": [{"token_id": token, "logprob": -token / 100} for token in ids]},
    }


def spoil(choices: list[dict]) -> object:
    """The answer with the fault that is asked for."""
    first = choices[0]
    if FAULT == "one_too_few":
        choices.pop()
    elif FAULT == "other_logprobs":
        first["logprobs"]["content"][0]["token_id"] += 1
    elif FAULT == "infinite":
        first["logprobs"]["content"][0]["logprob"] = float("-inf")
    elif FAULT == "no_logprobs":
        first["logprobs"] = None
    elif FAULT == "aborted":
        first |= {
            "finish_reason": "abort",
            "token_ids": [3],
            "logprobs": {"content": [{"token_id": 3, "logprob": -1}]},
        }
    elif FAULT == "beyond_the_stop":
        first["token_ids"][0] = first["logprobs"]["content"][0]["token_id"] = STOP
    elif FAULT == "no_choices":
        return {"error": "odd"}
    return {"choices": choices}


class Handler(BaseHTTPRequestHandler):
    def address_string(self) -> str:
        return "client"

    def do_GET(self) -> None:
        self._answer(503 if FAULT == "never_ready" else 200, b"")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(os.environ["FAKE_VLLM_REQUESTS"], "a", encoding="utf-8") as file:  # noqa: PTH123
            file.write(json.dumps({"path": self.path, **request}) + "\n")
        if FAULT == "dies":
            print("RuntimeError: out of everything", flush=True)
            os._exit(9)
        if FAULT == "hangs":
            time.sleep(60)
        if FAULT == "refuses":
            self._answer(400, b'{"error": {"message": "I will not"}}')
        elif FAULT == "no_json":
            self._answer(200, b"<html>")
        elif FAULT == "endless":
            self._answer(200, b"[" + b"1," * 2_000_000)
        elif FAULT == "breaks_off":
            self._answer(200, b'{"choices": [', length=1000)
        else:
            choices = [sample(request, index) for index in range(request["sampling_params"]["n"])]
            self._answer(200, json.dumps(spoil(choices[::-1])).encode())

    def _answer(self, code: int, content: bytes, length: int | None = None) -> None:
        try:
            self.send_response(code)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # the client has gone


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 256


def main() -> None:
    if FAULT == "does_not_start":
        print("ValueError: the cause of it all", flush=True)
        for number in range(40):
            print(f"line {number}", flush=True)
        sys.exit(1)
    worker = subprocess.Popen([sys.executable, "-I", "-c", "import time; time.sleep(300)"])
    print(f"worker {worker.pid}", flush=True)
    print("arguments", *sys.argv[1:], flush=True)
    if FAULT == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with Server(sys.argv[sys.argv.index("--uds") + 1], Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
