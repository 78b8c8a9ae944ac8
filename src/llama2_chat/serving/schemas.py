"""The bodies of requests and answers, as `/openapi.json` describes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_MESSAGES = [
    {"role": "user", "content": "What is 2 plus 2?"},
    {"role": "assistant", "content": "It is 4."},
]
_RENDERED = "<s>[INST] What is 2 plus 2? [/INST] It is 4. </s>"
_SCORE = {
    "helpfulness": 1.386294,
    "safety": 2.197225,
    "helpfulness_probability": 0.8,
    "safety_probability": 0.9,
    "branch": "helpfulness",
    "combined": 0.8,
}


def _example(value: dict[str, Any], *, closed: bool = False) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [value]}, extra="forbid" if closed else "ignore")


class MessageBody(BaseModel):
    """One turn's text."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str = Field(
        description="May be empty; [INST], [/INST], <<SYS>> and <</SYS>> only from the assistant"
    )


class DialogueBody(BaseModel):
    """A dialogue that ends with the assistant's message."""

    model_config = ConfigDict(extra="forbid")
    messages: list[MessageBody] = Field(
        min_length=2, description="system first or not at all, then user and assistant strictly in turn"
    )
    is_safety: bool | None = Field(
        False, description="The prompt is a safety prompt: R_c is the safety score"
    )


class ScoreRequest(BaseModel):
    """Body of POST /v1/score."""

    model_config = _example({"dialogues": [{"messages": _MESSAGES, "is_safety": False}]}, closed=True)
    dialogues: list[DialogueBody]


class ScoreBody(BaseModel):
    """One dialogue's scores; the fields of `llama2_chat.Score`."""

    helpfulness: float = Field(description="Raw score (logit)")
    safety: float | None = Field(description="Raw score (logit); null without a safety model")
    helpfulness_probability: float = Field(ge=0, le=1)
    safety_probability: float | None = Field(ge=0, le=1)
    branch: Literal["helpfulness", "safety"] = Field(description="Which score R_c is")
    combined: float = Field(ge=0, le=1, description="R_c as a probability")


class ScoreResponse(BaseModel):
    """Scores in the order of the dialogues."""

    model_config = _example({"model": "helpfulness_rm+safety_rm", "scores": [_SCORE]})
    model: str
    scores: list[ScoreBody]


class RewardRequest(BaseModel):
    """Body of POST /get_reward; other fields, such as `prompts` and `labels`, are left alone."""

    model_config = _example({"query": [_RENDERED]})
    query: list[str] = Field(description="Dialogues rendered in the model's chat format")


class ExtraLogs(BaseModel):
    """Raw scores of each model, in the order of the queries; `safety` only where there is a safety model."""

    helpfulness: list[float]
    safety: list[float] | None = None


class RewardResponse(BaseModel):
    """`rewards` and `scores` are both logit(R_c), in the order of the queries."""

    model_config = _example(
        {
            "rewards": [1.386294],
            "scores": [1.386294],
            "extra_logs": {"helpfulness": [1.386294], "safety": [2.197225]},
        }
    )
    rewards: list[float]
    scores: list[float]
    extra_logs: ExtraLogs


class HealthResponse(BaseModel):
    """Whether the server takes requests, and how much is waiting."""

    model_config = _example(
        {"status": "ok", "model": "helpfulness_rm", "waiting_dialogues": 0, "waiting_tokens": 0}
    )
    status: Literal["ok", "stopping"]
    model: str
    waiting_dialogues: int
    waiting_tokens: int


class ErrorResponse(BaseModel):
    """Why a request was not answered."""

    model_config = _example(
        {
            "error": 'dialogues[3].messages[1].role "robot" unknown; one of system, user, assistant',
        }
    )
    error: str = Field(description="Names the place in the body")
