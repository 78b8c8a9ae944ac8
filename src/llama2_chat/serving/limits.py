"""What the server takes on at most, and the refusals that say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_LONGEST_REASON = 500


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one server; docs/serving.md lists them."""

    body_bytes: int = 8 * 2**20
    """Of one request."""
    body_seconds: float = 30.0
    """In which a request's body must have arrived."""
    buffered_bytes: int = 128 * 2**20
    """Of all bodies that are being read or tokenised."""
    dialogues: int = 1024
    """In one request."""
    messages: int = 256
    """In one dialogue."""
    characters: int = 200_000
    """In one dialogue or query."""
    queue_tokens: int = 262_144
    """Waiting to be scored; a request that arrives while there are as many is refused."""
    batch_tokens: int | None = None
    """Scored at once; default: what suits the device."""
    batch_wait_seconds: float = 0.005
    """How long a request waits for others to share its batch."""


class RequestError(Exception):
    """A request that is answered with an error; the reason names the place in its body."""

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        # It quotes what was sent, which may be megabytes.
        self.reason = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}…"
        self.headers = dict(headers or {})


class QueueFullError(RequestError):
    """More work is waiting than the server takes on; `Retry-After` says when to come again."""

    def __init__(self, seconds: int) -> None:
        reason = f"the server has as much waiting as it takes on; try again in {seconds} s"
        super().__init__(429, reason, {"Retry-After": str(seconds)})


class StoppingError(RequestError):
    """The server is finishing what it has accepted and takes nothing new."""

    def __init__(self) -> None:
        super().__init__(503, "the server is stopping; send the request to another one or again later")


class ClientGoneError(Exception):
    """Whoever asked has hung up; nobody reads an answer."""


@dataclass(slots=True)
class ByteBudget:
    """Bytes that may be held at once, over all requests; used from the event loop alone."""

    limit: int
    used: int = field(default=0, init=False)

    def take(self, count: int) -> None:
        """Raises QueueFullError where there is no room."""
        if self.used + count > self.limit:
            raise QueueFullError(1)
        self.used += count

    def give_back(self, count: int) -> None:
        """The inverse of `take`."""
        self.used -= count
