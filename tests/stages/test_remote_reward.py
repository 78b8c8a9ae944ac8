"""Scores from a server: what is asked and taken, and every way in which it can fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from score_server import Answer, Server, scores_of

from llama2_chat.dialogue import Message
from llama2_chat.errors import UserInputError
from llama2_chat.reward import remote
from llama2_chat.reward.remote import RemoteReward
from llama2_chat.reward.scoring import RewardScorer
from llama2_chat.settings import UrlSource


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited between tries; nothing is really waited for."""
    found: list[float] = []
    monkeypatch.setattr(remote, "sleep", found.append)
    return found


def dialogues(*lengths: int) -> list[tuple[Message, ...]]:
    return [(Message("user", "q"), Message("assistant", "x" * length)) for length in lengths]


def reward(server: Server, slot: str = "helpfulness", **changes: Any) -> RemoteReward:
    return RemoteReward(UrlSource(url=server.url, **changes), slot=slot)  # type: ignore[arg-type]


@pytest.mark.parametrize(("slot", "factor"), [("helpfulness", -0.1), ("safety", 0.05)])
def test_raw_scores_of_the_slot_in_order(server: Server, slot: str, factor: float) -> None:
    scores = reward(server, slot, batch_size=3, parallel_requests=2).score_messages(dialogues(*range(10)))
    torch.testing.assert_close(scores, torch.arange(10) * factor, rtol=1e-6, atol=0)
    assert scores.dtype == torch.float32
    assert sorted(len(body["dialogues"]) for _, _, body in server.requests) == [1, 3, 3, 3]
    path, headers, body = server.requests[0]
    assert path == "/v1/score"
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers
    assert set(body["dialogues"][0]) == {"messages", "is_safety"}
    assert body["dialogues"][0]["messages"][0] == {"role": "user", "content": "q"}


def test_batches_go_at_the_same_time_but_no_more_than_allowed(server: Server) -> None:
    def slow(rows: list[dict[str, Any]]) -> Answer:
        time.sleep(0.05)
        return scores_of(rows)

    server.answer = slow
    scores = reward(server, batch_size=1, parallel_requests=3).score_messages(dialogues(*range(12)))
    assert scores.tolist() == pytest.approx([-n / 10 for n in range(12)], abs=1e-6)
    assert 2 <= server.most_at_once <= 3


def test_equal_dialogues_are_sent_once(server: Server) -> None:
    scores = reward(server).score_messages(dialogues(4, 2, 4, 4, 2))
    torch.testing.assert_close(scores, torch.tensor([-0.4, -0.2, -0.4, -0.4, -0.2]))
    assert [len(body["dialogues"]) for _, _, body in server.requests] == [2]


def test_no_dialogues_are_no_request(server: Server) -> None:
    assert reward(server).score_messages([]).shape == (0,)
    assert server.requests == []


def test_a_scorer_combines_two_servers_scores(server: Server) -> None:
    source = UrlSource(url=server.url + "/")
    scorer = RewardScorer.from_pretrained(source, source, safety_threshold=0.6)
    short, long = scorer.score(dialogues(2, 40))
    # σ(0.1) = 0.525 is below 0.6, σ(2) = 0.881 is not.
    assert (short.branch, short.helpfulness, short.safety) == (
        "safety",
        pytest.approx(-0.2),
        pytest.approx(0.1),
    )
    assert (long.branch, long.helpfulness, long.safety) == ("helpfulness", -4.0, 2.0)


def test_the_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REWARD_KEY", raising=False)
    with pytest.raises(UserInputError, match="REWARD_KEY"):
        reward(server, api_key_env="REWARD_KEY")
    monkeypatch.setenv("REWARD_KEY", "secret")
    reward(server, api_key_env="REWARD_KEY").score_messages(dialogues(1))
    assert server.requests[0][1]["Authorization"] == "Bearer secret"
    monkeypatch.setenv("REWARD_KEY", "secret\n")  # as a file that ends in a line break gives it
    reward(server, api_key_env="REWARD_KEY").score_messages(dialogues(1))
    assert server.requests[1][1]["Authorization"] == "Bearer secret"
    for bad in ("sec\nret", "secret\u20ac"):
        monkeypatch.setenv("REWARD_KEY", bad)
        with pytest.raises(UserInputError, match="printable ASCII") as raised:
            reward(server, api_key_env="REWARD_KEY")
        assert "sec" not in str(raised.value).replace(server.url, "")


def test_localhost_is_asked_without_the_proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert reward(server, retries=0).score_messages(dialogues(3)).tolist() == pytest.approx([-0.3])


def then(*answers: Answer) -> Callable[[list[dict[str, Any]]], Answer]:
    """These answers, then scores."""
    waiting = list(answers)
    return lambda rows: waiting.pop(0) if waiting else scores_of(rows)


@pytest.mark.parametrize("code", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again(server: Server, waits: list[float], code: int) -> None:
    server.answer = then((code, {}, b""), (code, {}, b""), (code, {}, b""))
    assert reward(server).score_messages(dialogues(3)).tolist() == pytest.approx([-0.3])
    assert waits == [0.5, 1.0, 2.0]
    assert len(server.requests) == 4


def test_the_servers_own_wait_is_kept_to_up_to_a_minute(server: Server, waits: list[float]) -> None:
    server.answer = then((429, {"Retry-After": "7"}, b""), (429, {"Retry-After": "3600"}, b""))
    reward(server).score_messages(dialogues(3))
    assert waits == [7.0, 60.0]


def test_tries_are_bounded(server: Server, waits: list[float]) -> None:
    server.answer = lambda _: (503, {}, b"")
    with pytest.raises(
        UserInputError, match=r"HTTP 503 Service Unavailable; tried 3 times\. Is the server up"
    ):
        reward(server, retries=2).score_messages(dialogues(3))
    assert len(server.requests) == 3
    assert waits == [0.5, 1.0]


def test_a_server_that_is_not_there(server: Server, waits: list[float]) -> None:
    server.close()
    with pytest.raises(UserInputError, match=r"no connection: .*refused.*; tried 2 times"):
        reward(server, retries=1).score_messages(dialogues(3))
    assert waits == [0.5]


@pytest.mark.parametrize("content", [b"", b'{"sc', scores_of([{"messages": [{"content": "abc"}]}])[2]])
def test_a_connection_that_breaks_is_made_again(server: Server, waits: list[float], content: bytes) -> None:
    """The answer announces more than comes; what came may even be whole."""
    server.answer = then((200, {"Content-Length": "5000"}, content))
    assert reward(server, timeout_seconds=1).score_messages(dialogues(3)).tolist() == pytest.approx([-0.3])
    assert waits == [0.5]


def test_no_answer_in_time(server: Server, waits: list[float]) -> None:
    release = threading.Event()

    def never(rows: list[dict[str, Any]]) -> Answer:
        release.wait(10)
        return scores_of(rows)

    server.answer = never
    started = time.perf_counter()
    try:
        with pytest.raises(UserInputError, match=r"no answer within 0\.2 seconds; tried 2 times"):
            reward(server, timeout_seconds=0.2, retries=1).score_messages(dialogues(3))
    finally:
        release.set()
    assert time.perf_counter() - started < 5
    assert len(waits) == 1


def scored(*values: object) -> Answer:
    return (
        200,
        {},
        json.dumps({"scores": [{"helpfulness": value, "safety": None} for value in values]}).encode(),
    )


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (scored(0.5), "1 scores for 2 dialogues"),
        (scored(1, 2, 3), "3 scores for 2 dialogues"),
        (scored(0.5, float("nan")), r"dialogue 2 of 2 \(answer 'xxxx'\): a finite raw score .* found nan"),
        (scored(float("-inf"), 1), r"dialogue 1 of 2 \(answer 'xxx'\): a finite raw score .* found -inf"),
        (scored(0.5, 1e300), r"dialogue 2 of 2 .* finite"),
        (scored(0.5, "0.7"), r"dialogue 2 of 2 .* a number is wanted, found '0.7'"),
        (scored(True, 0.7), r"dialogue 1 of 2 .* a number is wanted, found True"),
        (scored(0.5, None), r"dialogue 2 of 2 .* a number is wanted, found None"),
        ((200, {}, b"<html>hello"), r"the answer is not .*helpfulness.* found <html>hello"),
        ((200, {}, b'{"rewards": [1, 2]}'), r"found \{\"rewards\""),
        ((200, {}, b'{"scores": [1, 2]}'), r"found \{\"scores\""),
        ((200, {}, b'{"scores": ' + b"[" * 100_000), "the answer is not"),
        ((404, {}, b"no such path"), "HTTP 404 Not Found: no such path"),
        ((401, {}, b""), "HTTP 401 Unauthorized: no more is said; name the variable .* in api_key_env"),
        ((500, {}, b"out of memory"), "HTTP 500 Internal Server Error: out of memory"),
        ((422, {}, b"messages missing"), "HTTP 422"),
        ((302, {"Location": "http://elsewhere.example/"}, b""), "redirects to http://elsewhere.example/"),
        ((307, {"Location": "http://elsewhere.example/"}, b""), "redirects to http://elsewhere.example/"),
    ],
)
def test_an_answer_that_is_no_answer_is_told_at_once(
    server: Server, waits: list[float], answer: Answer, told: str
) -> None:
    server.answer = lambda _: answer
    with pytest.raises(UserInputError, match=told) as raised:
        reward(server).score_messages(dialogues(3, 4))
    assert str(raised.value).startswith(server.url)
    assert waits == []
    assert len(server.requests) == 1


def test_a_server_without_safety_model(server: Server) -> None:
    server.answer = lambda rows: scored(*range(len(rows)))
    with pytest.raises(UserInputError, match="gives no safety score"):
        reward(server, "safety").score_messages(dialogues(3, 4))


def test_one_bad_batch_ends_the_others(server: Server) -> None:
    server.answer = lambda _: (404, {}, b"")
    with pytest.raises(UserInputError, match="HTTP 404"):
        reward(server, batch_size=1, parallel_requests=2).score_messages(dialogues(*range(200)))
    assert len(server.requests) < 50
