"""Running the application: the socket, the line that says it is ready, signals, the orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
from collections.abc import Iterator
from types import FrameType

import uvicorn

from llama2_chat.errors import UserInputError
from llama2_chat.serving.app import build_app
from llama2_chat.serving.service import ScoringService

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 2048
_STDERR = 2
_SECONDS_TO_READ = 5.0
"""For clients to take their answers once all are there and the server stops."""
_KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep a connection in their pools, or they would now and then send into one that closes."""


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that refuses connections until `run` listens on it; raises UserInputError."""
    place = f"--host {host} --port {port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserInputError(
            f"{place}: {error.strerror or error}; give an address of this machine"
        ) from error
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        raise UserInputError(
            f"{place}: cannot be used ({error.strerror}); choose another port, 0 for any that is free"
        ) from error
    return found


def run(service: ScoringService, listener: socket.socket) -> int | None:
    """Serve until a signal, finish what was accepted; returns the signal's number.

    Raises:
        UserInputError: another server has begun to listen at this address.
    """
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        raise UserInputError(f"cannot listen ({error.strerror}); choose another --port") from error
    config = uvicorn.Config(
        build_app(service),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        backlog=_BACKLOG,
    )
    server = _Server(config, service)
    try:
        server.run(sockets=[listener])
    finally:
        service.close()
    return server.stopped_by


class _Server(uvicorn.Server):
    """uvicorn's server with our signals, and a last moment for bodies that are still arriving."""

    def __init__(self, config: uvicorn.Config, service: ScoringService) -> None:
        super().__init__(config)
        self._service = service
        self.stopped_by: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where, once requests are taken."""
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what was accepted."""
        self._service.stop_reading()
        bounded = asyncio.create_task(self._end_of_patience())
        await super().shutdown(sockets)
        bounded.cancel()

    async def _end_of_patience(self) -> None:
        """A client that does not read its answer keeps nobody else waiting for ever."""
        while self._service.in_progress:
            await asyncio.sleep(0.1)
        await asyncio.sleep(_SECONDS_TO_READ)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first signal asks for an orderly end; uvicorn's own way would raise it again afterwards."""
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by is not None:
            os._exit(128 + number)
        self.stopped_by = number
        self.should_exit = True
        name = signal.Signals(number).name
        message = f"\n{name}: answering what was accepted, then stopping; send it again to stop at once\n"
        with contextlib.suppress(OSError):
            os.write(_STDERR, message.encode())
