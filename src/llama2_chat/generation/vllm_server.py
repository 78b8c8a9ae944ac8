"""vLLM's server as a child process: started, asked over a Unix socket that is this user's alone, ended with its user.

vLLM wants another transformers than the toolkit and therefore lives in an environment of its own. Nothing of it is
imported here; what crosses is JSON over HTTP. A server of one's own on the same machine needs no second try: what
fails once has failed, and its log says why.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

from llama2_chat import interruption
from llama2_chat.errors import MissingFileError, SamplingServerError, UserInputError
from llama2_chat.settings import VllmConfig

_LAUNCHER = Path(__file__).with_name("vllm_launcher.py")
_LONGEST_SOCKET_PATH = 100
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_END = 20.0
_LAST_LINES, _LONGEST_LINE = 15, 300


class VllmServer:
    """A running server; `close` ends it, and so does the end of this process, however it comes."""

    def __init__(self, model: Path | str, config: VllmConfig, *, arguments: list[str], offline: bool) -> None:
        """Start it on a model and wait until it answers.

        Args:
            model: A folder, or a hub id where `offline` is False.
            arguments: Of `vllm serve`, beside those that say where it listens.

        Raises:
            MissingFileError: there is no such environment.
            SamplingServerError: it does not start, with the last lines of its log.
        """
        self.config = config
        if (problem := config.missing_environment()) is not None:
            raise MissingFileError(f"sampling.vllm.python: {problem}")
        self._folder = Path(tempfile.mkdtemp(prefix="llama2-chat-vllm-"))  # readable by this user alone
        self._socket = self._folder / "http"
        self.log = self._folder / "log"
        if len(os.fsencode(self._socket)) > _LONGEST_SOCKET_PATH:
            self._folder.rmdir()
            raise UserInputError(
                f"TMPDIR: {tempfile.gettempdir()} is too long for a socket's path; set a shorter one"
            )
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    str(config.interpreter),
                    "-I",
                    str(_LAUNCHER),
                    "--model",
                    str(model),
                    "--uds",
                    str(self._socket),
                    *arguments,
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(self._folder, offline=offline),
                start_new_session=True,  # Ctrl-C is for this process, which then ends the server
            )
        self._end = weakref.finalize(self, _end, self._process, self._folder)
        self._keep_log = False
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def post(self, path: str, body: Any, *, most_bytes: int) -> Any:
        """The JSON that the server answers.

        Raises:
            SamplingServerError: it refuses, breaks off, takes longer than `timeout_seconds`, answers with more than
                `most_bytes` or with something else than JSON.
        """
        try:
            status, answer = self._exchange("POST", path, json.dumps(body).encode(), most_bytes)
        except TimeoutError:
            raise self._failed(
                f"no answer within {self.config.timeout_seconds:g} seconds; raise vllm.timeout_seconds where that is "
                "too short"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(f"the connection broke off ({error or type(error).__name__})") from None
        shown = answer[:_LONGEST_LINE].decode("utf-8", errors="replace")
        if status != 200:
            raise self._failed(f"{path}: HTTP {status}: {shown}")
        if len(answer) > most_bytes:
            raise self._failed(f"{path}: the answer is longer than {most_bytes:,} bytes")
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            raise self._failed(f"{path}: the answer is no JSON, found {shown}") from None

    def close(self) -> None:
        """End it; its log stays if it has failed. The second call does nothing."""
        if self._end.detach() is not None:
            _end(self._process, self._folder, keep_log=self._keep_log)

    def _exchange(self, method: str, path: str, body: bytes | None, most_bytes: int) -> tuple[int, bytes]:
        connection = _UnixConnection(self._socket, self.config.timeout_seconds)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            return response.status, response.read(most_bytes + 1)
        finally:
            connection.close()

    def _wait_until_ready(self) -> None:
        limit = time.monotonic() + self.config.start_seconds
        while True:
            interruption.raise_if_requested()
            if self._process.poll() is not None:
                raise self._failed("it did not start; `make vllm-env` builds an environment in which it does")
            if time.monotonic() > limit:
                raise self._failed(
                    f"not ready after {self.config.start_seconds:g} seconds; raise vllm.start_seconds where the model "
                    "is large or the machine busy"
                )
            try:
                if self._socket.exists() and self._exchange("GET", "/health", None, 0)[0] == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass  # it listens before it answers
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _failed(self, problem: str) -> SamplingServerError:
        self._keep_log = True
        lines = (
            self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        )
        # Each process of the server says in its own words that another has failed: the first error is the cause.
        errors = [line for line in lines[:-_LAST_LINES] if "Error: " in line][:3]
        shown = "\n".join(f"  {line[:_LONGEST_LINE]}" for line in [*errors, *lines[-_LAST_LINES:]])
        return SamplingServerError(
            f"vLLM's server: {problem}\nIts log, {self.log}, "
            + (f"ends with\n{shown}" if lines else "is empty")
        )


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _environment(folder: Path, *, offline: bool) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_RPC_BASE_PATH": str(folder),
    }
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    # On CPUs vLLM would bind its threads to cores of its own choice, whatever else runs there.
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment.setdefault("OMP_NUM_THREADS", str(cores))
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _end(process: subprocess.Popen[bytes], folder: Path, *, keep_log: bool = False) -> None:
    """Close the launcher's standard input, which ends the server, and see that nothing of it is left."""
    assert process.stdin is not None
    try:
        process.stdin.close()
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if keep_log:
            for path in folder.iterdir():
                if path.name != "log":
                    path.unlink(missing_ok=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
