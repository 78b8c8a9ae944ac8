"""Requests that wait at the same time share batches: one worker thread, a bounded queue, a bounded wait.

A batch takes a fair share of every waiting request, so a large one is cut over several batches and a small one
beside it is in the next. A failure while a batch is scored fails the requests in it and no other.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Generic, TypeVar

from llama2_chat.serving.limits import QueueFullError, StoppingError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_RATE_MEMORY = 0.8
_LONGEST_RETRY_SECONDS = 60


class _Pending(Generic[_Item, _Result]):
    """One request: its items in the order in which they are scored, and the results that are there."""

    def __init__(self, items: Sequence[_Item], tokens: Sequence[int]) -> None:
        self.items = items
        self.tokens = tokens
        # Dialogues of similar length share a forward pass best, so a large request is cut by length.
        self.left = sorted(range(len(items)), key=tokens.__getitem__)
        self.results: list[_Result | None] = [None] * len(items)
        self.missing = len(items)
        self.future: Future[list[_Result]] = Future()
        self.arrived = time.monotonic()

    def resolve(self, value: list[_Result] | BaseException) -> None:
        """Hand the outcome over; one that nobody waits for any more is dropped."""
        try:
            if isinstance(value, BaseException):
                self.future.set_exception(value)
            else:
                self.future.set_result(value)
        except InvalidStateError:
            return


class Batcher(Generic[_Item, _Result]):
    """Scores the items of concurrent requests in shared batches."""

    def __init__(
        self,
        score: Callable[[list[_Item]], Sequence[_Result]],
        *,
        tokens_of: Callable[[_Item], int],
        batch_tokens: int,
        queue_tokens: int,
        wait_seconds: float,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """Start the worker.

        Args:
            score: Gives a result for each item, in order; called by the worker thread alone.
            tokens_of: An item's size.
            batch_tokens: Most tokens of a batch; an item that is larger makes a batch alone.
            queue_tokens: While as many are waiting, `submit` refuses.
            wait_seconds: How long a request waits for others to share its batch.
            on_failure: Told what `score` raised.
        """
        self._score, self._tokens_of, self._on_failure = score, tokens_of, on_failure
        self._batch_tokens, self._queue_tokens = batch_tokens, queue_tokens
        self._wait_seconds = wait_seconds
        self._waiting: list[_Pending[_Item, _Result]] = []
        self._waiting_tokens = self._waiting_items = 0
        self._tokens_per_second: float | None = None
        self._closed = False
        self._changed = threading.Condition()
        # A daemon, so that a second signal ends the process in the middle of a batch.
        self._worker = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._worker.start()

    @property
    def waiting_tokens(self) -> int:
        """Tokens that wait for a batch."""
        return self._waiting_tokens

    @property
    def waiting_items(self) -> int:
        """Items that wait for a batch."""
        return self._waiting_items

    def check_room(self) -> None:
        """Raise what `submit` would raise."""
        with self._changed:
            if self._closed:
                raise StoppingError
            self._drop_cancelled()
            if self._waiting_tokens >= self._queue_tokens:
                raise QueueFullError(self._retry_seconds())

    def submit(self, items: Sequence[_Item]) -> Future[list[_Result]]:
        """Queue one request's items; the future holds its results in their order. Cancelling it drops what is left.

        The last request that is taken may go beyond the bound, so that a large one is not refused for ever.

        Raises:
            QueueFullError: as much is waiting as may.
            StoppingError: `close` has been called.
        """
        pending: _Pending[_Item, _Result] = _Pending(items, [self._tokens_of(item) for item in items])
        with self._changed:
            self.check_room()
            if not items:
                pending.resolve([])
                return pending.future
            self._waiting.append(pending)
            self._waiting_tokens += sum(pending.tokens)
            self._waiting_items += len(items)
            self._changed.notify()
        return pending.future

    def close(self) -> None:
        """Take nothing new, finish everything that was accepted, end the worker."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()

    def _work(self) -> None:
        while batch := self._next_batch():
            started = time.monotonic()
            try:
                results = self._score([pending.items[place] for pending, place in batch])
                if len(results) != len(batch):
                    raise RuntimeError(f"{len(results)} results for {len(batch)} dialogues")
            except BaseException as error:
                self._fail(batch, error)
                continue
            self._measure(batch, time.monotonic() - started)
            for (pending, place), result in zip(batch, results, strict=True):
                pending.results[place] = result
                pending.missing -= 1
                if not pending.missing:
                    pending.resolve(pending.results)  # type: ignore[arg-type]

    def _next_batch(self) -> list[tuple[_Pending[_Item, _Result], int]]:
        """The next batch as (request, place in it); empty once everything is done after `close`."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if self._waiting:
                    oldest = min(pending.arrived for pending in self._waiting)
                    left = oldest + self._wait_seconds - time.monotonic()
                    if self._closed or left <= 0 or self._waiting_tokens >= self._batch_tokens:
                        return self._take()
                    self._changed.wait(left)
                elif self._closed:
                    return []
                else:
                    self._changed.wait()

    def _take(self) -> list[tuple[_Pending[_Item, _Result], int]]:
        """Rounds over the waiting requests, each giving at most its share of the room that is left."""
        batch: list[tuple[_Pending[_Item, _Result], int]] = []
        room = self._batch_tokens
        served: dict[int, None] = {}
        while True:
            able = [pending for pending in self._waiting if pending.left]
            before = len(batch)
            for number, pending in enumerate(able):
                share = max(1, room // (len(able) - number))
                while pending.left and share > 0:
                    tokens = pending.tokens[pending.left[-1]]
                    if tokens > room and batch:
                        break
                    batch.append((pending, pending.left.pop()))
                    room, share = room - tokens, share - tokens
                    served[id(pending)] = None
            if len(batch) == before or room <= 0:
                break
        self._waiting_tokens -= sum(pending.tokens[place] for pending, place in batch)
        self._waiting_items -= len(batch)
        # Whoever got nothing comes first the next time.
        self._waiting = sorted((p for p in self._waiting if p.left), key=lambda p: id(p) in served)
        return batch

    def _fail(self, batch: list[tuple[_Pending[_Item, _Result], int]], error: BaseException) -> None:
        failed = {id(pending): pending for pending, _ in batch}
        with self._changed:
            for pending in failed.values():
                self._drop(pending)
        for pending in failed.values():
            pending.resolve(error)
        with suppress(Exception):  # a log that cannot be written must not end the worker
            self._on_failure(error)

    def _drop_cancelled(self) -> None:
        for pending in [pending for pending in self._waiting if pending.future.cancelled()]:
            self._drop(pending)

    def _drop(self, pending: _Pending[_Item, _Result]) -> None:
        self._waiting_tokens -= sum(pending.tokens[place] for place in pending.left)
        self._waiting_items -= len(pending.left)
        pending.left = []
        self._waiting = [other for other in self._waiting if other is not pending]

    def _measure(self, batch: list[tuple[_Pending[_Item, _Result], int]], seconds: float) -> None:
        rate = sum(pending.tokens[place] for pending, place in batch) / max(seconds, 1e-6)
        known = self._tokens_per_second
        self._tokens_per_second = rate if known is None else _RATE_MEMORY * known + (1 - _RATE_MEMORY) * rate

    def _retry_seconds(self) -> int:
        """When the queue will be about half as long, at the rate seen so far."""
        if self._tokens_per_second is None:
            return 1
        return min(
            _LONGEST_RETRY_SECONDS, max(1, math.ceil(self._waiting_tokens / 2 / self._tokens_per_second))
        )
