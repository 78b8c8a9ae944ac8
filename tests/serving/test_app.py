"""The routes in this process: formats, refusals, failures; the models are real where scores are compared."""

from __future__ import annotations

import asyncio
import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from small_server import LIMITS, Client, Row, talk

from llama2_chat import RewardScorer
from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Message
from llama2_chat.reward.scoring import RewardModel
from llama2_chat.serving.app import build_app
from llama2_chat.serving.schemas import HealthResponse, RewardResponse, ScoreResponse
from llama2_chat.serving.scoring import ScoringEngine
from llama2_chat.serving.service import ScoringService


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


def test_a_long_dialogue_loses_its_oldest_turns_as_offline(serve, offline: RewardScorer) -> None:
    row = {
        "messages": [message for n in range(9) for message in talk(f"What is {n} plus {n}? " * 9)["messages"]]
    }
    answer = serve().post("/v1/score", json={"dialogues": [row]})
    (expected,) = offline.score([row["messages"]])
    assert answer.json()["scores"][0]["helpfulness"] == pytest.approx(expected.helpfulness, abs=1e-5)


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
    scored: list[int] = []

    class Recording(ScoringEngine):
        def score(self, dialogues: Any) -> Any:
            scored.append(len(dialogues))
            return super().score(dialogues)

    service = ScoringService(Recording(offline, name="rm"), replace(LIMITS, batch_wait_seconds=30))
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
    assert scored == []


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
