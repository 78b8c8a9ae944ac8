"""Request bodies to messages and texts; whatever is wrong is refused with its place in the body."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from llama2_chat.dialogue import ROLES, Message, check_role_order, refuse_chat_tags
from llama2_chat.errors import did_you_mean
from llama2_chat.fields import check_choice, check_text, json_type, required
from llama2_chat.serving.limits import Limits, RequestError

_LONGEST_NAME = 50
"""Of a field that is looked up among the known ones; what is longer is no slip of the pen."""


@dataclass(frozen=True, slots=True)
class DialogueToScore:
    """Messages that end with the assistant's, and whether their prompt is tagged as a safety prompt."""

    messages: tuple[Message, ...]
    is_safety: bool


def parse_score_request(body: bytes, limits: Limits) -> list[DialogueToScore]:
    """The dialogues of a body of `POST /v1/score`; raises RequestError."""
    row = _object(_json(body), "the body", ("dialogues",))
    dialogues = _list(row, "dialogues", limits.dialogues)
    try:
        return [_dialogue(value, f"dialogues[{n}]", limits) for n, value in enumerate(dialogues)]
    except ValueError as error:
        raise RequestError(400, str(error)) from None


def parse_reward_request(body: bytes, limits: Limits) -> list[str]:
    """The rendered texts of a body of `POST /get_reward`; fields beside `query` are left alone."""
    row = _object(_json(body), "the body", None)
    queries = _list(row, "query", limits.dialogues)
    try:
        for number, text in enumerate(queries):
            _check_length(len(check_text(text, f"query[{number}]")), f"query[{number}]", limits)
    except ValueError as error:
        raise RequestError(400, str(error)) from None
    return queries


def _json(body: bytes) -> object:
    try:
        return json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise RequestError(400, f"the body is not valid JSON: {error.msg} at {place}") from None
    except (RecursionError, ValueError):
        # Lists nested too deeply, or an integer with more digits than Python converts.
        raise RequestError(
            400, "the body is not usable JSON: nested too deeply, or a number too long"
        ) from None


def _object(value: object, place: str, allowed: Collection[str] | None) -> dict[str, Any]:
    """`value` if it is an object with no other fields than the allowed ones (None: any)."""
    if not isinstance(value, dict):
        raise RequestError(400, f"{place} must be an object, found {json_type(value)}")
    unknown = [] if allowed is None else [name for name in value if name not in allowed]
    if unknown:
        hint = did_you_mean(unknown[0][:_LONGEST_NAME], allowed or ())
        raise RequestError(
            400, f'{place}: field "{unknown[0]}" unknown{hint}; one of {", ".join(allowed or ())}'
        )
    return value


def _list(row: dict[str, Any], name: str, most: int) -> list[Any]:
    try:
        value = required(row, name)
    except ValueError as error:
        raise RequestError(400, f"the body: {error}") from None
    if not isinstance(value, list):
        raise RequestError(400, f"{name} must be a list, found {json_type(value)}")
    if len(value) > most:
        raise RequestError(400, f"{name} holds {len(value)}; at most {most} a request, send several")
    return value


def _dialogue(value: object, place: str, limits: Limits) -> DialogueToScore:
    row = _object(value, place, ("messages", "is_safety"))
    rows = required(row, "messages", f"{place}.")
    if not isinstance(rows, list):
        raise ValueError(f"{place}.messages must be a list of messages, found {json_type(rows)}")
    if len(rows) > limits.messages:
        raise ValueError(f"{place}.messages holds {len(rows)}; at most {limits.messages} are taken")
    messages = tuple(_message(row, f"{place}.messages[{n}]") for n, row in enumerate(rows))
    check_role_order(messages, f"{place}.messages")
    if messages[-1].role != "assistant":
        raise ValueError(
            f'{place}.messages[{len(messages) - 1}].role is "{messages[-1].role}": a dialogue to be scored ends with '
            "the assistant's message"
        )
    _check_length(sum(len(message.content) for message in messages), place, limits)
    is_safety = row.get("is_safety")
    if is_safety is not None and not isinstance(is_safety, bool):
        raise ValueError(f"{place}.is_safety must be true or false, found {json_type(is_safety)}")
    return DialogueToScore(messages, bool(is_safety))


def _message(value: object, place: str) -> Message:
    row = _object(value, place, ("role", "content"))
    role = check_choice(required(row, "role", f"{place}."), f"{place}.role", ROLES)
    content = check_text(required(row, "content", f"{place}."), f"{place}.content")
    if role != "assistant":
        refuse_chat_tags(content, f"{place}.content")
    return Message(role, content)


def _check_length(characters: int, place: str, limits: Limits) -> None:
    if characters > limits.characters:
        raise ValueError(f"{place} has {characters} characters; at most {limits.characters} are taken")
