"""Runs vLLM's server and ends it with the process that asked for it. Run by the Python of vLLM's own environment.

The standard library alone: the toolkit is not there. The process that starts this one holds the other end of its
standard input. Where that end closes, because it was closed or because its holder is gone, however it went, the
server gets SIGTERM and what is left of it after a while SIGKILL. All of it is one process group.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading

_SERVER = "vllm.entrypoints.launchers.api_server.entry"
_GRACE_SECONDS = 10.0
_STANDARD_INPUT = 0
_PR_SET_PDEATHSIG = 1


def _end_with_this_process() -> None:
    """Linux alone; elsewhere the server outlives a launcher that is killed, but not its client."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_with_client(server: subprocess.Popen[bytes]) -> None:
    while os.read(_STANDARD_INPUT, 1):
        pass
    server.terminate()
    try:
        server.wait(_GRACE_SECONDS)
    finally:
        os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run the server with this script's arguments until it ends or the client does."""
    # -I: neither the caller's PYTHONPATH nor this folder's modules are vLLM's business.
    command = [sys.executable, "-I", "-m", _SERVER, *sys.argv[1:]]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_end_with_this_process)
    threading.Thread(target=_end_with_client, args=(server,), daemon=True).start()
    code = server.wait()
    print(f"vLLM's server ended with code {code}", flush=True)
    os.killpg(0, signal.SIGKILL)  # its workers, if any is left, and this process


if __name__ == "__main__":
    main()
