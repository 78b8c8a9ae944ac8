"""The routes in this process: formats, refusals, failures; the models are real where scores are compared."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from small_server import MAX_TOKENS

from llama2_chat import RewardScorer
from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Message
from llama2_chat.reward.scoring import RewardModel
from llama2_chat.serving.app import build_app
from llama2_chat.serving.limits import Limits
from llama2_chat.serving.schemas import HealthResponse, RewardResponse, ScoreResponse
from llama2_chat.serving.scoring import ScoringEngine
from llama2_chat.serving.service import ScoringService

Row = dict[str, Any]
LIMITS = Limits(body_bytes=20_000, dialogues=40, messages=20, characters=3000, body_seconds=0.5)


def talk(question: str = "What is 2 plus 2?", answer: str = "It is 4.", **more: Any) -> Row:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        **more,
    }


class Client:
    """Requests to an application without a network."""

    def __init__(self, service: ScoringService) -> None:
        self.service = service
        self.app = build_app(service)

    def post(self, path: str, **arguments: Any) -> httpx.Response:
        return asyncio.run(self.gathered([(path, arguments)]))[0]

    async def gathered(self, requests: list[tuple[str, Row]]) -> list[httpx.Response]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://server"
        ) as client:
            return await asyncio.gather(*(client.post(path, **row) for path, row in requests))

    def get(self, path: str) -> httpx.Response:
        async def request() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.get(path)

        return asyncio.run(request())


@pytest.fixture
def serve(offline: RewardScorer) -> Iterator[Callable[..., Client]]:
    services: list[ScoringService] = []

    def make(scorer: RewardScorer = offline, limits: Limits = LIMITS, **more: Any) -> Client:
        services.append(ScoringService(ScoringEngine(scorer, name="rm"), limits, **more))
        return Client(services[-1])

    yield make
    for service in services:
        service.close()


def test_scores_are_those_of_offline_scoring(serve, offline: RewardScorer) -> None:
    dialogues = [
        talk(f"What is {n} plus {n}?", f"It is {'very ' * n}{2 * n}. 🦙", is_safety=n % 3 == 0)
        for n in range(12)
    ]
    dialogues.append(
        {"messages": [{"role": "system", "content": "Be kind."}, *talk("Hi </s>", "")["messages"]]}
    )
    dialogues.append(dialogues[0])
    answer = serve().post("/v1/score", json={"dialogues": dialogues})
    assert answer.status_code == 200
    body = answer.json()
    ScoreResponse.model_validate(body, strict=True)
    assert body["model"] == "rm"
    expected = offline.score(
        [d["messages"] for d in dialogues], [d.get("is_safety", False) for d in dialogues]
    )
    assert {one["branch"] for one in body["scores"]} == {"helpfulness", "safety"}
    for found, score in zip(body["scores"], expected, strict=True):
        assert list(found) == [
            "helpfulness", "safety", "helpfulness_probability", "safety_probability", "branch", "combined"
        ]  # fmt: skip
        for name, value in found.items():
            wanted = getattr(score, name)
            assert value == wanted if isinstance(wanted, str) else value == pytest.approx(wanted, abs=1e-5)


def test_without_a_safety_model(serve, offline: RewardScorer) -> None:
    client = serve(RewardScorer(offline.helpfulness))
    (score,) = client.post("/v1/score", json={"dialogues": [talk(is_safety=True)]}).json()["scores"]
    (wanted,) = offline.score([talk()["messages"]])
    assert (score["safety"], score["safety_probability"], score["branch"]) == (None, None, "helpfulness")
    assert score["combined"] == pytest.approx(1 / (1 + math.exp(-wanted.helpfulness)), abs=1e-6)
    reward = client.post("/get_reward", json={"query": ["<s>[INST] What is 2 plus 2? [/INST] It is 4. </s>"]})
    assert reward.json()["rewards"] == [pytest.approx(wanted.helpfulness, abs=1e-5)]
    assert list(reward.json()["extra_logs"]) == ["helpfulness"]


def decoded(chat_format: ChatFormat, row: Row) -> str:
    messages = [Message(**message) for message in row["messages"]]
    ids = [token for segment in chat_format.segments(messages) for token in segment.ids]
    return chat_format.tokenizer.decode(ids, keep_control=True)  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("name", ["helpful", "chatml"])
def test_get_reward_equals_score_on_the_same_dialogues(
    serve, models, offline: RewardScorer, name: str
) -> None:
    """Text that a trainer decoded from a dialogue's ids, in both chat formats; logit(R_c) of one and two models."""
    model = RewardModel.from_pretrained(models / name, device="cpu")
    rows = [talk(f"What is {n} plus 1?", f"It is {n + 1}, {'really ' * (n % 4)}so.") for n in range(20)]
    rows.append({"messages": [*rows[0]["messages"], *rows[1]["messages"]]})
    unsafe = sorted(score.safety_probability for score in offline.score([row["messages"] for row in rows]))
    scorer = RewardScorer(model, offline.safety if name == "helpful" else None, safety_threshold=unsafe[10])
    client = serve(scorer)
    texts = [decoded(model.chat_format, row) for row in rows]
    answer = client.post("/get_reward", json={"query": texts, "prompts": ["x"], "labels": [None], "n": 1})
    RewardResponse.model_validate(answer.json(), strict=True)
    scores = client.post("/v1/score", json={"dialogues": rows}).json()["scores"]
    expected = [math.log(score["combined"] / (1 - score["combined"])) for score in scores]
    assert answer.json()["rewards"] == answer.json()["scores"] == pytest.approx(expected, abs=1e-5)
    assert answer.json()["extra_logs"]["helpfulness"] == pytest.approx(
        [s["helpfulness"] for s in scores], abs=1e-5
    )
    if name == "helpful":
        assert {score["branch"] for score in scores} == {"helpfulness", "safety"}


@pytest.mark.parametrize(("path", "field"), [("/v1/score", "dialogues"), ("/get_reward", "query")])
def test_nothing_to_score(serve, path: str, field: str) -> None:
    answer = serve().post(path, json={field: []})
    assert answer.status_code == 200
    assert answer.json()["scores"] == []


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
    ({"dialogues": [talk(), talk("no " * 900)]}, "dialogues[1]: the last turn alone is longer than the 256"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), BAD)
def test_bad_input_is_400_with_the_place(serve, body: bytes | Row, reason: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = serve().post("/v1/score", content=content)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]
    assert list(answer.json()) == ["error"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"query": "one text"}, "query must be a list, found a string"),
        ({"prompts": []}, '"query" is missing'),
        ({"query": ["<s>[INST] a [/INST] b </s>", 3]}, "query[1] must be a string, found a number"),
        ({"query": ["<s>[INST] a [/INST] b </s>", "hello"]}, "query[1]: not in this model's chat format"),
        ({"query": ["<s>[INST] " + "no " * 900]}, f"tokens; the model takes {MAX_TOKENS}"),
        ({"query": ["<s>[INST] " + "no " * 1200]}, "query[0] has 3610 characters; at most 3000"),
    ],
)
def test_bad_rendered_text_is_400_with_the_place(serve, body: Row, reason: str) -> None:
    answer = serve().post("/get_reward", json=body)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


def test_a_long_dialogue_loses_its_oldest_turns_as_offline(serve, offline: RewardScorer) -> None:
    row = {
        "messages": [message for n in range(9) for message in talk(f"What is {n} plus {n}? " * 9)["messages"]]
    }
    answer = serve().post("/v1/score", json={"dialogues": [row]})
    (expected,) = offline.score([row["messages"]])
    assert answer.json()["scores"][0]["helpfulness"] == pytest.approx(expected.helpfulness, abs=1e-5)


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


def test_health(serve) -> None:
    client = serve()
    answer = client.get("/health")
    HealthResponse.model_validate(answer.json(), strict=True)
    assert answer.json() == {"status": "ok", "model": "rm", "waiting_dialogues": 0, "waiting_tokens": 0}
    client.service.stopping = True
    assert (client.get("/health").status_code, client.get("/health").json()["status"]) == (503, "stopping")
    assert client.post("/v1/score", json={"dialogues": []}).status_code == 503


def test_unknown_paths_and_methods_are_json(serve) -> None:
    client = serve()
    assert client.get("/v2/score").status_code == 404
    assert "/v2/score: no such path" in client.get("/v2/score").json()["error"]
    answer = client.get("/v1/score")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "error" in answer.json()
    assert client.post("/v1/score/", json={}).status_code == 404


class Failing(ScoringEngine):
    """Fails where a dialogue is as long as the marked one."""

    bad_tokens = -1

    def score(self, dialogues: Any) -> Any:
        if any(dialogue.tokens == self.bad_tokens for dialogue in dialogues):
            raise RuntimeError(f"{'SEC'}RET what was sent")
        return super().score(dialogues)


def test_a_failure_inside_is_500_for_its_batch_and_the_server_goes_on(
    offline: RewardScorer, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = Failing(offline, name="rm")
    # One dialogue a batch.
    service = ScoringService(engine, replace(LIMITS, batch_tokens=1))
    client = Client(service)
    bad = {"json": {"dialogues": [talk("SECRET question, longer than the others?")]}}
    good = {"json": {"dialogues": [talk()]}}
    from llama2_chat.serving.requests import parse_score_request

    (parsed,) = parse_score_request(json.dumps(bad["json"]).encode(), LIMITS)
    engine.bad_tokens = engine.encode_messages(parsed).tokens
    answers = asyncio.run(client.gathered([("/v1/score", row) for row in (good, bad, good, bad, good)]))
    assert [answer.status_code for answer in answers] == [200, 500, 200, 500, 200]
    assert client.post("/v1/score", **good).status_code == 200
    service.close()
    log = capfd.readouterr().err
    assert log.count("error: RuntimeError") == 2  # one for each batch that failed
    assert "in score" in log
    assert "SECRET" not in log + answers[1].text


def test_whoever_hangs_up_leaves_the_queue(offline: RewardScorer) -> None:
    """A client that goes while it waits: its dialogues are not scored, and nothing fails."""
    service = ScoringService(ScoringEngine(offline, name="rm"), replace(LIMITS, batch_wait_seconds=30))
    app = build_app(service)
    body = json.dumps({"dialogues": [talk()]}).encode()
    sent: list[Row] = []

    async def call() -> None:
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Row:
            try:
                return next(messages)
            except StopIteration:
                while not service.batcher.waiting_items:
                    await asyncio.sleep(0.01)
                return {"type": "http.disconnect"}

        async def send(message: Row) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/score", "raw_path": b"/v1/score", "query_string": b"",
            "headers": [], "http_version": "1.1", "scheme": "http", "root_path": "", "asgi": {"version": "3.0"},
        }  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 20)

    asyncio.run(call())
    assert sent[0]["status"] == 499
    service.close()
    assert service.batcher.waiting_items == 0


def test_the_description_is_complete(serve) -> None:
    """Every reference leads somewhere, every route names its body and its errors, and the examples are right."""
    client = serve()
    schema = client.get("/openapi.json").json()
    for reference in re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(schema)):
        assert reference in schema["components"]["schemas"]
    assert set(schema["paths"]) == {"/v1/score", "/get_reward", "/health"}
    for path in ("/v1/score", "/get_reward"):
        route = schema["paths"][path]["post"]
        wanted = {"200", "400", "401", "408", "413", "429", "500", "503"}
        assert set(route["responses"]) == wanted
        for answer in route["responses"].values():
            assert "$ref" in answer["content"]["application/json"]["schema"]
        assert "Retry-After" in route["responses"]["429"]["headers"]
        name = route["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        (example,) = schema["components"]["schemas"][name]["examples"]
        assert client.post(path, json=example).status_code == 200
    for name, model in (("ScoreResponse", ScoreResponse), ("RewardResponse", RewardResponse)):
        (example,) = schema["components"]["schemas"][name]["examples"]
        model.model_validate(example, strict=True)
    assert client.get("/docs").status_code == 200
