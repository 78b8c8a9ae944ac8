"""What happens to a request between its headers and its answer; knows of no routes.

The event loop only reads bodies and waits. One thread parses and tokenises (a tokenizer is not for two threads at
once), in slices, so that a large body does not hold up the small ones; the batcher's thread scores.
"""

from __future__ import annotations

import asyncio
import hmac
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from llama2_chat.errors import UserInputError
from llama2_chat.serving.batcher import Batcher
from llama2_chat.serving.limits import ByteBudget, ClientGoneError, Limits, RequestError, StoppingError
from llama2_chat.serving.scoring import EncodedDialogue, ScoringEngine

if TYPE_CHECKING:
    from llama2_chat.reward.scoring import Score

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Parsed = TypeVar("_Parsed")
_T = TypeVar("_T")
_ENCODING_SECONDS = 0.05
"""After which a request's tokenising lets others go first."""
_SECONDS_AFTER_STOP = 2.0
"""What a body that is still arriving gets once the server stops."""


class ScoringService:
    """One engine with its threads, limits and key."""

    def __init__(self, engine: ScoringEngine, limits: Limits, *, api_key: str | None = None) -> None:
        self.engine = engine
        self.limits = limits
        self._api_key = api_key
        self._bodies = ByteBudget(limits.buffered_bytes)
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encoding")
        self._deadlines: set[asyncio.Timeout] = set()
        self.stopping = False
        self.in_progress = 0
        """Requests that are being read or scored."""
        self.batcher: Batcher[EncodedDialogue, Score] = Batcher(
            engine.score,
            tokens_of=lambda dialogue: dialogue.tokens,
            batch_tokens=limits.batch_tokens or engine.batch_tokens,
            queue_tokens=limits.queue_tokens,
            wait_seconds=limits.batch_wait_seconds,
            on_failure=log_failure,
        )

    def check_key(self, authorization: str | None) -> None:
        """Raise RequestError (401) unless the header holds the key, if there is one; in constant time."""
        if self._api_key is None:
            return
        scheme, _, key = (authorization or "").partition(" ")
        # Header text is latin-1; what cannot be told apart by time are bytes of any length.
        right = hmac.compare_digest(key.strip().encode("latin-1", "replace"), self._api_key.encode())
        if scheme.lower() != "bearer" or not right:
            raise RequestError(
                401,
                "send the header Authorization: Bearer KEY with this server's key",
                {"WWW-Authenticate": "Bearer"},
            )

    async def score(
        self,
        receive: Receive,
        content_length: int | None,
        *,
        parse: Callable[[bytes, Limits], Sequence[_Parsed]],
        encode: Callable[[_Parsed], EncodedDialogue],
        place: str,
    ) -> list[Score]:
        """Read a body, encode what `parse` finds in it, score it together with what others sent.

        Raises:
            RequestError: it is refused, `place` is what the reason calls the parts of the body; or scoring failed.
            ClientGoneError: whoever asked has hung up.
        """
        with self._in_progress():
            self._check_open()
            self.batcher.check_room()
            body = await self._read(receive, content_length)
            held = len(body)
            try:
                items = await self._in_encoder(parse, bytes(body), self.limits)
                del body
                encoded: list[EncodedDialogue] = []
                while len(encoded) < len(items):
                    encoded += await self._in_encoder(_encode_some, encode, items, place, len(encoded))
                future = self.batcher.submit(encoded)
            finally:
                self._bodies.give_back(held)
            try:
                return await _unless_gone(future, receive)
            except ClientGoneError:
                raise
            except Exception as error:
                # The batcher has told the log.
                raise RequestError(500, "scoring failed; the server's log says where") from error

    @contextmanager
    def _in_progress(self) -> Iterator[None]:
        self.in_progress += 1
        try:
            yield
        finally:
            self.in_progress -= 1

    def stop_reading(self) -> None:
        """Refuse what is new and give bodies that are still arriving a last moment; call it in the event loop."""
        self.stopping = True
        end = asyncio.get_running_loop().time() + _SECONDS_AFTER_STOP
        for deadline in [deadline for deadline in self._deadlines if not deadline.expired()]:
            deadline.reschedule(min(end, deadline.when() or end))

    def close(self) -> None:
        """Finish what was accepted and end the threads."""
        self.stopping = True
        self._encoder.shutdown()
        self.batcher.close()

    def _check_open(self) -> None:
        if self.stopping:
            raise StoppingError

    async def _in_encoder(self, function: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._encoder, function, *arguments)

    async def _read(self, receive: Receive, content_length: int | None) -> bytearray:
        """The body, whose bytes the budget then holds; never more of it than the limit."""
        limit = self.limits.body_bytes
        if content_length is not None and content_length > limit:
            raise _too_large(limit)
        body = bytearray()
        deadline = asyncio.timeout(self.limits.body_seconds)
        try:
            async with deadline:
                self._deadlines.add(deadline)
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    chunk = message.get("body", b"")
                    if len(body) + len(chunk) > limit:
                        raise _too_large(limit)
                    self._bodies.take(len(chunk))
                    body += chunk
                    more = message.get("more_body", False)
        except TimeoutError:
            self._bodies.give_back(len(body))
            self._check_open()
            raise RequestError(
                408,
                f"the body did not arrive within {self.limits.body_seconds:g} s; send it again",
                {"Connection": "close"},
            ) from None
        except BaseException:
            self._bodies.give_back(len(body))
            raise
        finally:
            self._deadlines.discard(deadline)
        return body


def log_failure(error: BaseException) -> None:
    """Where an error came from, on standard error; not its message, which may quote what was sent."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    print(f"error: {type(error).__name__}\n{frames}", end="", file=sys.stderr, flush=True)


def _encode_some(
    encode: Callable[[_Parsed], EncodedDialogue], items: Sequence[_Parsed], place: str, start: int
) -> list[EncodedDialogue]:
    """The items from `start` on, for as long as one request may take at a time; at least one."""
    encoded: list[EncodedDialogue] = []
    end = time.monotonic() + _ENCODING_SECONDS
    for number in range(start, len(items)):
        try:
            encoded.append(encode(items[number]))
        except UserInputError as error:
            raise RequestError(400, f"{place}[{number}]: {error}") from None
        if time.monotonic() > end:
            break
    return encoded


async def _unless_gone(future: Future[_T], receive: Receive) -> _T:
    """The future's result; it is cancelled where the client hangs up first."""
    result = asyncio.wrap_future(future)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        both: set[asyncio.Future[Any]] = {result, gone}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        raise ClientGoneError
    finally:
        gone.cancel()
        result.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_large(limit: int) -> RequestError:
    return RequestError(413, f"the body is larger than {limit} bytes; send fewer dialogues a request")
