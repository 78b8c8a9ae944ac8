"""The routes of the scoring server and their description."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from llama2_chat import __version__
from llama2_chat.serving.limits import ClientGoneError, RequestError
from llama2_chat.serving.requests import parse_reward_request, parse_score_request
from llama2_chat.serving.schemas import (
    ErrorResponse,
    HealthResponse,
    RewardRequest,
    RewardResponse,
    ScoreRequest,
    ScoreResponse,
)
from llama2_chat.serving.service import ScoringService, log_failure

_REFS = "#/components/schemas/{model}"
_ERRORS: dict[int, str] = {
    400: "The body is wrong; the reason names the place",
    401: "The server wants a key: Authorization: Bearer KEY",
    408: "The body did not arrive in time",
    413: "The body is too large",
    429: "Too much is waiting; Retry-After says when to come again",
    500: "Scoring failed",
    503: "The server is stopping",
}
_CLIENT_CLOSED = 499
Answer = Callable[[Request], Awaitable[dict[str, Any]]]


def build_app(service: ScoringService) -> FastAPI:
    """The application; starting and closing `service` is its caller's."""
    app = FastAPI(
        title="llama2-chat scoring server",
        version=__version__,
        description="Reward models of llama2-chat over HTTP.",
        redirect_slashes=False,
        redoc_url=None,
    )
    app.add_exception_handler(HTTPException, _http_error)

    async def score(request: Request) -> dict[str, Any]:
        found = await service.score(
            request.receive,
            _content_length(request),
            parse=parse_score_request,
            encode=service.engine.encode_messages,
            place="dialogues",
        )
        return {"model": service.engine.name, "scores": [asdict(one) for one in found]}

    async def get_reward(request: Request) -> dict[str, Any]:
        found = await service.score(
            request.receive,
            _content_length(request),
            parse=parse_reward_request,
            encode=service.engine.encode_text,
            place="query",
        )
        rewards = [one.combined_logit for one in found]
        logs: dict[str, Any] = {"helpfulness": [one.helpfulness for one in found]}
        if service.engine.scorer.safety is not None:
            logs["safety"] = [one.safety for one in found]
        return {"rewards": rewards, "scores": rewards, "extra_logs": logs}

    async def health(request: Request) -> Response:
        return _json(
            503 if service.stopping else 200,
            {
                "status": "stopping" if service.stopping else "ok",
                "model": service.engine.name,
                "waiting_dialogues": service.batcher.waiting_items,
                "waiting_tokens": service.batcher.waiting_tokens,
            },
        )

    _add_post(app, service, "/v1/score", score, "Scores of dialogues", ScoreRequest, ScoreResponse)
    _add_post(
        app, service, "/get_reward", get_reward, "logit(R_c) of rendered text", RewardRequest, RewardResponse
    )
    app.add_api_route("/health", health, methods=["HEAD"], include_in_schema=False)
    app.add_api_route(
        "/health",
        health,
        summary="Whether the server takes requests; needs no key",
        responses={
            200: {"model": HealthResponse},
            503: {"model": HealthResponse, "description": _ERRORS[503]},
        },
    )
    _describe(app)
    return app


def _add_post(
    app: FastAPI,
    service: ScoringService,
    path: str,
    answer: Answer,
    summary: str,
    body: type[BaseModel],
    response: type[BaseModel],
) -> None:
    """A route whose body is read by the service itself, which bounds it while it arrives."""

    async def endpoint(request: Request) -> Response:
        try:
            service.check_key(request.headers.get("authorization"))
            return _json(200, await answer(request))
        except RequestError as error:
            return _json(error.status, {"error": error.reason}, error.headers)
        except ClientGoneError:
            return Response(status_code=_CLIENT_CLOSED)
        except Exception as error:
            # Not left to the framework, which would log the message, and with it what was sent.
            log_failure(error)
            return _json(500, {"error": "the server failed; its log says where"})

    content = {"application/json": {"schema": {"$ref": _REFS.format(model=body.__name__)}}}
    responses: dict[int | str, dict[str, Any]] = {200: {"model": response}}
    for status, description in _ERRORS.items():
        responses[status] = {"model": ErrorResponse, "description": description}
    responses[429]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds"}}
    app.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        name=path.strip("/").replace("/", "_"),
        summary=summary,
        responses=responses,
        openapi_extra={
            "requestBody": {"required": True, "content": content},
            "security": [{}, {"key": []}],
        },
    )


def _describe(app: FastAPI) -> None:
    """Add the request bodies, which FastAPI does not see, to the description."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            bodies: list[Any] = [(ScoreRequest, "validation"), (RewardRequest, "validation")]
            _, definitions = models_json_schema(bodies, ref_template=_REFS)
            schema["components"]["schemas"] |= definitions["$defs"]
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


async def _http_error(request: Request, error: Exception) -> Response:
    """Paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    reason = {404: f"{request.url.path}: no such path; /docs lists them"}.get(
        error.status_code, f"{request.method} {request.url.path}: {error.detail}"
    )
    return _json(error.status_code, {"error": reason}, dict(error.headers or {}))


def _content_length(request: Request) -> int | None:
    """The declared length; the HTTP parser has refused what is no number."""
    declared = request.headers.get("content-length")
    return int(declared) if declared and declared.isdigit() else None


def _json(status: int, value: Any, headers: dict[str, str] | None = None) -> Response:
    # A reason may quote half of a surrogate pair, which UTF-8 cannot hold.
    content = json.dumps(value, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")
    return Response(content, status, headers, media_type="application/json")
