"""The real server as a process, many clients at once; every answer is compared with offline scoring."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest
from small_server import Running, Start, until

from llama2_chat import RewardScorer
from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Message

Row = dict[str, Any]
SECRET = "PELICAN"
"""Stands in everything that is sent, and must not stand in the log."""


def dialogue(rng: random.Random, words: int) -> Row:
    text = " ".join(
        rng.choice([SECRET, "What", "is", "two", "🦙", "héllo", "漢字", "</s>", "\n"]) for _ in range(words)
    )
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"It is {rng.random()}."}]
    if rng.random() < 0.3:
        messages.insert(0, {"role": "system", "content": "Be kind."})
    return {"messages": messages, "is_safety": rng.random() < 0.5}


def rendered(row: Row, chat_format: ChatFormat) -> str:
    messages = [Message(**message) for message in row["messages"]]
    ids = [token for segment in chat_format.segments(messages) for token in segment.ids]
    return chat_format.tokenizer.decode(ids, keep_control=True)  # type: ignore[attr-defined,no-any-return]


def check(answer: httpx.Response, rows: list[Row], offline: RewardScorer) -> None:
    assert answer.status_code == 200, answer.text
    expected = offline.score([row["messages"] for row in rows], [row["is_safety"] for row in rows])
    for found, score in zip(answer.json()["scores"], expected, strict=True):
        for name in ("helpfulness", "safety", "combined"):
            assert found[name] == pytest.approx(getattr(score, name), abs=1e-5)
        assert found["branch"] == score.branch


def headers_of(length: int, **more: str) -> bytes:
    lines = [
        "POST /v1/score HTTP/1.1",
        "Host: x",
        f"Content-Length: {length}",
        *(f"{k}: {v}" for k, v in more.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.fixture(scope="module")
def server(start: Start) -> Running:
    return start("--max-body-bytes", "300000", "--body-timeout", "4", "--max-characters", "3000")


def test_concurrent_clients_good_and_bad(server: Running, offline: RewardScorer) -> None:
    """Twenty clients, each sending good, bad, oversized and empty requests in an order of its own."""
    scored: list[tuple[httpx.Response, list[Row]]] = []
    rewarded: list[tuple[httpx.Response, list[Row]]] = []

    async def client(number: int) -> int:
        rng = random.Random(number)
        kinds = ["one", "few", "many", "empty", "bad json", "bad role", "tags", "oversized", "rendered"]
        rng.shuffle(kinds)
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            for kind in kinds:
                await one(http, kind, rng)
        return len(kinds)

    async def one(http: httpx.AsyncClient, kind: str, rng: random.Random) -> None:
        count = {"one": 1, "few": 5, "many": 60}.get(kind)
        if count is not None:
            rows = [dialogue(rng, rng.randrange(1, 40)) for _ in range(count)]
            scored.append((await http.post("/v1/score", json={"dialogues": rows}), rows))
        elif kind == "empty":
            answer = await http.post("/v1/score", json={"dialogues": []})
            assert (answer.status_code, answer.json()["scores"]) == (200, [])
        elif kind == "oversized":
            answer = await http.post("/v1/score", content=SECRET.encode() * 100_000)
            assert answer.status_code == 413
        elif kind == "rendered":
            rows = [dialogue(rng, 10) | {"is_safety": False} for _ in range(3)]
            texts = [rendered(row, offline.helpfulness.chat_format) for row in rows]
            rewarded.append((await http.post("/get_reward", json={"query": texts, "prompts": texts}), rows))
        else:
            bad = {
                "bad json": f'{{"dialogues": [{SECRET}',
                "bad role": json.dumps({"dialogues": [{"messages": [{"role": SECRET, "content": SECRET}]}]}),
                "tags": json.dumps(
                    {"dialogues": [{"messages": [{"role": "user", "content": f"[INST] {SECRET}"}]}]}
                ),
            }[kind]
            answer = await http.post("/v1/score", content=bad)
            assert answer.status_code == 400
            assert list(answer.json()) == ["error"]

    async def everybody() -> list[int]:
        return await asyncio.gather(*(client(number) for number in range(20)))

    assert sum(asyncio.run(everybody())) == 180
    # Afterwards: scoring here would hold up the clients in the middle of their bodies.
    assert (len(scored), len(rewarded)) == (60, 20)
    for answer, rows in scored:
        check(answer, rows, offline)
    for answer, rows in rewarded:
        expected = [score.helpfulness for score in offline.score([row["messages"] for row in rows])]
        assert answer.json()["extra_logs"]["helpfulness"] == pytest.approx(expected, abs=1e-5)
    health = httpx.get(f"{server.url}/health").json()
    assert (health["waiting_dialogues"], health["waiting_tokens"]) == (0, 0)


def test_slow_clients_hold_nobody_up(server: Running, offline: RewardScorer) -> None:
    """Thirty bodies that trickle in; others are answered meanwhile, the slow ones get 408."""
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(30)]
    started = time.monotonic()
    for connection in slow:
        connection.sendall(headers_of(1000) + b'{"dialogues": ')
    rows = [dialogue(random.Random(0), 5)]
    answer = httpx.post(f"{server.url}/v1/score", json={"dialogues": rows})
    assert time.monotonic() - started < 3.9
    check(answer, rows, offline)
    for connection in slow[:3]:
        connection.sendall(b" ")
    for connection in slow:
        connection.settimeout(20)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        connection.close()


def test_a_body_without_a_declared_length_is_bounded_too(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(31):
            connection.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
        # Answered although the body has not ended.
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_nothing_that_was_sent_is_logged(server: Running) -> None:
    """After the tests above, good and bad: the log of the server does not hold a word of them."""
    assert SECRET not in server.errors.read_text()


def test_ctrl_c_on_an_idle_server(server: Running) -> None:
    """The last test of this server."""
    server.process.send_signal(2)
    assert server.process.wait(20) == 130


@pytest.fixture(scope="module")
def strict(start: Start) -> Running:
    return start("--queue-tokens", "2000", "--api-key-env", "SCORING_KEY", SCORING_KEY="correct horse")


RIGHT = {"Authorization": "Bearer correct horse"}


def test_a_key(strict: Running, offline: RewardScorer) -> None:
    server = strict
    rows = [dialogue(random.Random(1), 5)]
    for header in ({}, {"Authorization": "Bearer wrong"}):
        answer = httpx.post(f"{server.url}/v1/score", json={"dialogues": rows}, headers=header)
        assert answer.status_code == 401
        # A large body is not even looked at.
        answer = httpx.post(f"{server.url}/v1/score", content=b" " * 1_000_000, headers=header)
        assert answer.status_code == 401
    check(httpx.post(f"{server.url}/v1/score", json={"dialogues": rows}, headers=RIGHT), rows, offline)
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert "correct horse" not in server.errors.read_text()


def test_a_full_queue_says_when_to_come_again(strict: Running, offline: RewardScorer) -> None:
    rng = random.Random(2)
    load = [[dialogue(rng, 30) for _ in range(20)] for _ in range(15)]

    async def persistent(http: httpx.AsyncClient, rows: list[Row]) -> int:
        """Comes again as long as it is refused; returns how often it was."""
        refused = 0
        while True:
            answer = await http.post("/v1/score", json={"dialogues": rows})
            if answer.status_code != 429:
                check(answer, rows, offline)
                return refused
            refused += 1
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert "try again in" in answer.json()["error"]
            await asyncio.sleep(0.05)

    async def everybody() -> list[int]:
        async with httpx.AsyncClient(base_url=strict.url, headers=RIGHT, timeout=120) as http:
            return await asyncio.gather(*(persistent(http, rows) for rows in load))

    assert sum(asyncio.run(everybody())) > 0
    rows = [dialogue(rng, 5)]
    check(httpx.post(f"{strict.url}/v1/score", json={"dialogues": rows}, headers=RIGHT), rows, offline)


def test_a_signal_during_work_loses_nothing_that_was_accepted(start: Start, offline: RewardScorer) -> None:
    server = start("--queue-tokens", "10000000", "--batch-tokens", "600")
    rng = random.Random(3)
    load = [[dialogue(rng, 30) for _ in range(20)] for _ in range(30)]
    half = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    half.sendall(headers_of(1000) + b"{")
    refused = []

    async def everybody() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            tasks = [asyncio.create_task(http.post("/v1/score", json={"dialogues": rows})) for rows in load]
            end = time.monotonic() + 60
            while (await http.get("/health")).json()["waiting_dialogues"] < 200:
                assert time.monotonic() < end, "the work never piled up"
                await asyncio.sleep(0.005)
            server.process.terminate()
            while "SIGTERM: answering" not in server.errors.read_text():
                assert time.monotonic() < end
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)  # for the socket to close
            assert not all(task.done() for task in tasks), "the work was over before the signal"
            with pytest.raises(httpx.ConnectError):
                async with httpx.AsyncClient() as late:
                    refused.append(await late.get(f"{server.url}/health"))
            return await asyncio.gather(*tasks)

    for answer, rows in zip(asyncio.run(everybody()), load, strict=True):
        check(answer, rows, offline)
    assert half.recv(1000).startswith(b"HTTP/1.1 503 ")
    assert server.process.wait(60) == 143
    log = server.errors.read_text()
    assert "every request that was accepted has been answered" in log
    assert "Traceback" not in log


def test_a_client_that_does_not_read_its_answer_keeps_the_server_from_nothing(start: Start) -> None:
    """An answer of megabytes, more than the system buffers, into a socket that takes next to nothing."""
    server = start("--max-dialogues", "30000", "--max-body-bytes", "10000000", "--queue-tokens", "10000000")
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.connect(("127.0.0.1", server.port))
        body = json.dumps({"dialogues": [dialogue(random.Random(5), 1)] * 30_000}).encode()
        deaf.sendall(headers_of(len(body)) + body)
        deaf.settimeout(60)
        assert deaf.recv(15).startswith(b"HTTP/1.1 200 ")
        server.process.terminate()
        assert server.process.wait(20) == 143


def test_a_second_signal_stops_at_once(start: Start) -> None:
    server = start("--queue-tokens", "10000000", "--body-timeout", "600")
    waiting = socket.create_connection(("127.0.0.1", server.port))
    rows = [dialogue(random.Random(4), 30) for _ in range(1000)]
    body = json.dumps({"dialogues": rows}).encode()
    waiting.sendall(headers_of(len(body)) + body)
    until(lambda: httpx.get(f"{server.url}/health").json()["waiting_dialogues"] > 500)
    started = time.monotonic()
    server.process.terminate()
    until(lambda: "SIGTERM: answering" in server.errors.read_text())
    server.process.terminate()
    assert server.process.wait(20) == 143
    assert time.monotonic() - started < 10
    assert "has been answered" not in server.errors.read_text()


def test_wrong_command_lines_are_exit_code_2(models, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from llama2_chat.cli.main import run_command

    monkeypatch.setenv("EMPTY", " ")
    helpful = ["serve", "--helpfulness", str(models / "helpful"), "--device", "cpu"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in [
            (["--port", port], f"--port {port}: cannot be used (Address already in use)"),
            (
                ["--host", "no.such.host.invalid", "--allow-no-key"],
                "--host no.such.host.invalid --port 8000: ",
            ),
            (["--host", "0.0.0.0"], "--host 0.0.0.0: other machines could use this server without a key"),
            (["--api-key-env", "EMPTY"], "the environment variable EMPTY is not set or empty"),
            (["--api-key-env", "NOT_SET"], "the environment variable NOT_SET is not set or empty"),
            (["--safety-threshold", "1"], "--safety-threshold: 1.0 is not between 0 and 1"),
            (["--port", "0", "--safety", "nowhere/at/all"], "nowhere/at/all: no such model folder"),
        ]:
            assert run_command([*helpful, *arguments]) == 2, arguments
            assert message in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(models) -> None:
    """In a process of its own, in which the two packages cannot be found."""
    code = (
        "import sys, importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n in ('fastapi', 'uvicorn') else find(n, *a)\n"
        "from llama2_chat.cli.main import main\n"
        f"main(['serve', '--helpfulness', {str(models / 'helpful')!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: serve wants fastapi and uvicorn, not installed here; pip install 'llama2-chat[serve]'\n"
    )
