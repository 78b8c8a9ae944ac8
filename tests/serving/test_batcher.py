"""The batcher with a scorer that only counts: order, fairness, waiting, failures, the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
from small_server import until

from llama2_chat.serving.batcher import Batcher
from llama2_chat.serving.limits import QueueFullError, StoppingError

Item = tuple[str, int]
"""A name and its tokens."""


class FakeScorer:
    """Scores an item with its name; records batches; waits while held; fails on "bad"."""

    def __init__(self) -> None:
        self.batches: list[list[Item]] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, items: list[Item]) -> list[str]:
        self.batches.append(items)
        assert self.free.wait(20)
        if any(name == "bad" for name, _ in items):
            raise ArithmeticError("bad")
        return [f"score of {name}" for name, _ in items]


@pytest.fixture
def scorer() -> FakeScorer:
    return FakeScorer()


@pytest.fixture
def make(scorer: FakeScorer) -> Iterator[Callable[..., Batcher[Item, str]]]:
    made: list[Batcher[Item, str]] = []

    def build(**changes: float) -> Batcher[Item, str]:
        values = {"batch_tokens": 10, "queue_tokens": 1000, "wait_seconds": 0.0, **changes}
        made.append(Batcher(scorer, tokens_of=lambda item: item[1], **values))  # type: ignore[arg-type]
        return made[-1]

    yield build
    scorer.free.set()
    for batcher in made:
        batcher.close()


def held(batcher: Batcher[Item, str], scorer: FakeScorer) -> Future[list[str]]:
    """Keep the worker busy with a first batch, so that what follows gathers in the queue."""
    scorer.free.clear()
    first = batcher.submit([("first", 1)])
    until(lambda: len(scorer.batches) == 1)
    return first


def names(batch: list[Item]) -> list[str]:
    return [name for name, _ in batch]


def test_results_come_back_in_the_order_of_each_request(make, scorer: FakeScorer) -> None:
    batcher = make()
    held(batcher, scorer)
    requests = [[(f"{r}-{n}", 1 + (7 * n + r) % 5) for n in range(17)] for r in range(5)]
    futures = [batcher.submit(items) for items in requests]
    scorer.free.set()
    for items, future in zip(requests, futures, strict=True):
        assert future.result(20) == [f"score of {name}" for name, _ in items]
    assert sum(len(batch) for batch in scorer.batches) == 1 + 5 * 17
    assert all(sum(tokens for _, tokens in batch) <= 10 for batch in scorer.batches)
    assert (batcher.waiting_items, batcher.waiting_tokens) == (0, 0)


def test_small_requests_share_a_batch(make, scorer: FakeScorer) -> None:
    batcher = make()
    held(batcher, scorer)
    futures = [batcher.submit([(str(n), 2)]) for n in range(5)]
    scorer.free.set()
    for future in futures:
        future.result(20)
    assert names(scorer.batches[1]) == ["0", "1", "2", "3", "4"]


def test_a_small_request_is_in_the_next_batch_beside_a_large_one(make, scorer: FakeScorer) -> None:
    batcher = make()
    held(batcher, scorer)
    large = batcher.submit([(f"large {n}", 1) for n in range(100)])
    small = batcher.submit([("small", 3)])
    scorer.free.set()
    assert small.result(20) == ["score of small"]
    assert "small" in names(scorer.batches[1])
    assert sum(tokens for _, tokens in scorer.batches[1]) == 10
    assert len(large.result(20)) == 100


def test_everybody_waiting_gets_a_turn_before_anybody_gets_two(make, scorer: FakeScorer) -> None:
    """More requests than a batch holds: those that got nothing come first the next time."""
    batcher = make(batch_tokens=4)
    held(batcher, scorer)
    futures = [batcher.submit([(f"{r}", 1)] * 3) for r in range(8)]
    scorer.free.set()
    for future in futures:
        future.result(20)
    order = [name for batch in scorer.batches[1:] for name in names(batch)]
    assert [sorted(order[start : start + 8]) for start in (0, 8, 16)] == [[str(r) for r in range(8)]] * 3


def test_an_item_larger_than_a_batch_is_scored_alone(make, scorer: FakeScorer) -> None:
    batcher = make()
    held(batcher, scorer)
    large, small = batcher.submit([("large", 50)]), batcher.submit([("small", 1)])
    scorer.free.set()
    assert (large.result(20), small.result(20)) == (["score of large"], ["score of small"])
    assert ["large"] in [names(batch) for batch in scorer.batches]


def test_a_large_request_is_cut_by_length(make, scorer: FakeScorer) -> None:
    """Every batch holds items of neighbouring lengths: the longest ones first."""
    batcher = make(batch_tokens=12)
    futures = batcher.submit([(str(tokens), tokens) for tokens in (1, 6, 2, 5, 3, 4, 6, 5)])
    futures.result(20)
    lengths = [[tokens for _, tokens in batch] for batch in scorer.batches]
    assert lengths == [[6, 6], [5, 5], [4, 3, 2, 1]]


def test_a_lone_request_waits_no_longer_than_the_bound(make) -> None:
    batcher = make(wait_seconds=0.3)
    started = time.monotonic()
    batcher.submit([("alone", 1)]).result(20)
    assert 0.29 < time.monotonic() - started < 2


def test_requests_within_the_wait_share_a_batch(make, scorer: FakeScorer) -> None:
    batcher = make(wait_seconds=0.5)
    first = batcher.submit([("a", 1)])
    time.sleep(0.1)
    second = batcher.submit([("b", 1)])
    assert (first.result(20), second.result(20)) == (["score of a"], ["score of b"])
    assert [names(batch) for batch in scorer.batches] == [["a", "b"]]


def test_a_full_batch_does_not_wait(make) -> None:
    batcher = make(wait_seconds=60)
    assert batcher.submit([("full", 10)]).result(20) == ["score of full"]


def test_a_failure_fails_the_requests_of_its_batch_alone(make, scorer: FakeScorer) -> None:
    batcher = make(batch_tokens=2)
    first = held(batcher, scorer)
    beside, bad = batcher.submit([("beside", 1)]), batcher.submit([("bad", 1)])
    later = batcher.submit([("later", 2)])
    scorer.free.set()
    assert (first.result(20), later.result(20)) == (["score of first"], ["score of later"])
    for future in (beside, bad):
        with pytest.raises(ArithmeticError):
            future.result(20)
    assert batcher.submit([("after", 1)]).result(20) == ["score of after"]


def test_a_log_that_cannot_be_written_ends_nothing(scorer: FakeScorer) -> None:
    def full(error: BaseException) -> None:
        raise OSError("no space left")

    batcher: Batcher[Item, str] = Batcher(
        scorer,
        tokens_of=lambda item: item[1],
        batch_tokens=10,
        queue_tokens=100,
        wait_seconds=0.0,
        on_failure=full,
    )
    try:
        with pytest.raises(ArithmeticError):
            batcher.submit([("bad", 1)]).result(20)
        assert batcher.submit([("good", 1)]).result(20) == ["score of good"]
    finally:
        batcher.close()


def test_a_request_that_failed_in_part_is_scored_no_further(make, scorer: FakeScorer) -> None:
    batcher = make(batch_tokens=1)
    held(batcher, scorer)
    # Equal lengths are taken from the end.
    future = batcher.submit([("never", 1), ("bad", 1), ("done", 1)])
    scorer.free.set()
    with pytest.raises(ArithmeticError):
        future.result(20)
    assert batcher.submit([("after", 1)]).result(20) == ["score of after"]
    assert [names(batch) for batch in scorer.batches] == [["first"], ["done"], ["bad"], ["after"]]
    assert (batcher.waiting_items, batcher.waiting_tokens) == (0, 0)


def test_a_full_queue_refuses_and_later_takes_again(make, scorer: FakeScorer) -> None:
    batcher = make(queue_tokens=5)
    held(batcher, scorer)
    accepted = [batcher.submit([("a", 4)]), batcher.submit([("b", 4)])]
    with pytest.raises(QueueFullError) as refused:
        batcher.submit([("c", 1)])
    assert int(refused.value.headers["Retry-After"]) >= 1
    scorer.free.set()
    assert [future.result(20) for future in accepted] == [["score of a"], ["score of b"]]
    assert batcher.submit([("d", 1)]).result(20) == ["score of d"]


def test_what_is_cancelled_is_not_scored(make, scorer: FakeScorer) -> None:
    batcher = make()
    held(batcher, scorer)
    gone, stays = batcher.submit([("gone", 1)]), batcher.submit([("stays", 1)])
    assert gone.cancel()
    scorer.free.set()
    assert stays.result(20) == ["score of stays"]
    assert "gone" not in [name for batch in scorer.batches for name in names(batch)]
    assert (batcher.waiting_items, batcher.waiting_tokens) == (0, 0)


def test_close_finishes_what_was_accepted_and_refuses_the_rest(make, scorer: FakeScorer) -> None:
    batcher = make(wait_seconds=60)
    futures = [batcher.submit([(str(n), 1)]) for n in range(4)]
    batcher.close()
    assert [future.result(0) for future in futures] == [[f"score of {n}"] for n in range(4)]
    with pytest.raises(StoppingError):
        batcher.submit([("late", 1)])


def test_an_empty_request_has_no_results(make, scorer: FakeScorer) -> None:
    assert make().submit([]).result(20) == []
    assert scorer.batches == []
