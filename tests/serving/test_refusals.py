"""What the server refuses, in this process: bad input, bodies too large or too slow, missing keys."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from small_server import LIMITS, MAX_TOKENS, Row, talk

BAD = [
    (b"{", "the body is not valid JSON: Expecting property name enclosed in double quotes at line 1 column 2"),
    (b"", "the body is not valid JSON"),
    (b'{"dialogues": ["\xff"]}', "the body is not UTF-8 (byte 16)"),
    (b"[" * 10_000, "nested too deeply"),
    (b'{"dialogues": [' + b"9" * 5000 + b"]}", "a number too long"),
    (b"[]", "the body must be an object, found a list"),
    ({}, '"dialogues" is missing'),
    ({"dialogues": [], "model": "x"}, 'the body: field "model" unknown; one of dialogues'),
    ({"dialogue": []}, 'field "dialogue" unknown (did you mean "dialogues"?)'),
    ({"dialogues": talk()}, "dialogues must be a list, found an object"),
    ({"dialogues": [talk()] * 41}, "dialogues holds 41; at most 40 a request"),
    ({"dialogues": [talk(), "x"]}, "dialogues[1] must be an object, found a string"),
    ({"dialogues": [talk(), {}]}, '"dialogues[1].messages" is missing'),
    ({"dialogues": [talk(safety=True)]}, 'dialogues[0]: field "safety" unknown'),
    ({"dialogues": [talk(is_safety="no")]}, "dialogues[0].is_safety must be true or false, found a string"),
    ({"dialogues": [{"messages": []}]}, "dialogues[0].messages is empty"),
    ({"dialogues": [{"messages": talk()["messages"][:1]}]}, 'dialogues[0].messages[0].role is "user"'),
    ({"dialogues": [{"messages": talk()["messages"][1:]}]}, 'dialogues[0].messages[0] has role "assistant"'),
    ({"dialogues": [{"messages": talk()["messages"] * 11}]}, "dialogues[0].messages holds 22; at most 20"),
    ({"dialogues": [talk("x" * 3001, "")]}, "dialogues[0] has 3001 characters; at most 3000"),
    ({"dialogues": [{"messages": [{"role": "user"}]}]}, '"dialogues[0].messages[0].content" is missing'),
    ({"dialogues": [talk(), talk(1)]}, "dialogues[1].messages[0].content must be a string, found a number"),
    ({"dialogues": [talk(answer=None)]}, "dialogues[0].messages[1].content must be a string, found null"),
    (
        {"dialogues": [{"messages": [{"role": "robot", "content": ""}]}]},
        'dialogues[0].messages[0].role "robot" unknown; one of system, user, assistant',
    ),
    ({"dialogues": [talk("[INST] x")]}, "dialogues[0].messages[0].content holds the chat tag [INST]"),
    (b'{"dialogues": [{"messages": [{"role": "user", "content": "\\ud800"}]}]}', "half of a surrogate pair"),
    (b'{"\\ud800": 1}', 'the body: field "\ud800" unknown'),
    (b'{"dialogues": [{"messages": [{"role": "\\ud800", "content": ""}]}]}', 'role "\ud800" unknown'),
    ({"dialogues": [talk(), talk("no " * 900)]}, "dialogues[1]: the last turn alone is longer than the 256"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), BAD)
def test_bad_input_is_400_with_the_place(serve, body: bytes | Row, reason: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = serve().post("/v1/score", content=content)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]
    assert list(answer.json()) == ["error"]


def test_a_reason_quotes_no_megabytes(serve) -> None:
    answer = serve().post("/v1/score", json={"x" * 15_000: 1})
    assert answer.status_code == 400
    assert len(answer.content) < 700


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"query": "one text"}, "query must be a list, found a string"),
        ({"prompts": []}, '"query" is missing'),
        ({"query": ["<s>[INST] a [/INST] b </s>", 3]}, "query[1] must be a string, found a number"),
        ({"query": ["<s>[INST] a [/INST] b </s>", "hello"]}, "query[1]: not in this model's chat format"),
        ({"query": ["<s>[INST] a </s>"]}, "query[0]: a turn has no answer: [/INST] is not in it"),
        ({"query": ["<s>[INST] [/INST] " + "no " * 900]}, f"tokens; the model takes {MAX_TOKENS}"),
        ({"query": ["<s>[INST] " + "no " * 1200]}, "query[0] has 3610 characters; at most 3000"),
    ],
)
def test_bad_rendered_text_is_400_with_the_place(serve, body: Row, reason: str) -> None:
    answer = serve().post("/get_reward", json=body)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


async def in_chunks(size: int, count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b" " * size


def test_bodies_are_bounded_while_they_arrive(serve) -> None:
    client = serve()
    assert client.post("/v1/score", content=b" " * 20_001).status_code == 413
    seen = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal seen
        for _ in range(1000):
            seen += 1
            yield b" " * 1000

    answer = client.post("/v1/score", content=endless())
    assert answer.status_code == 413
    assert "larger than 20000 bytes" in answer.json()["error"]
    assert seen == 21
    assert client.post("/v1/score", content=in_chunks(1000, 20)).status_code == 400
    assert client.service._bodies.used == 0


def test_all_bodies_together_are_bounded(serve) -> None:
    client = serve(limits=replace(LIMITS, buffered_bytes=1000))
    assert client.post("/v1/score", content=b" " * 1001).status_code == 429
    assert client.post("/v1/score", json={"dialogues": [talk()]}).status_code == 200


def test_a_body_that_does_not_arrive_is_408(serve) -> None:
    client = serve()

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    answer = client.post("/v1/score", content=slow())
    assert (answer.status_code, "within 0.5 s" in answer.json()["error"]) == (408, True)
    assert client.service._bodies.used == 0


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic s3cret", "s3cret", "Bearer s3cret2", "Bearer é"],
)
def test_a_missing_or_wrong_key_is_401(serve, header: str | None) -> None:
    client = serve(api_key="s3cret")
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    # Refused before the body is read: it would be a 400.
    answer = client.post("/v1/score", content=b"{", headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert "s3cret" not in answer.text


def test_the_right_key(serve) -> None:
    client = serve(api_key="s3cret")
    for header in ("Bearer s3cret", "bearer s3cret"):
        answer = client.post("/v1/score", json={"dialogues": []}, headers={"Authorization": header})
        assert answer.status_code == 200
    assert client.post("/get_reward", json={"query": []}).status_code == 401
    assert client.get("/health").status_code == 200
